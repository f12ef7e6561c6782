# SPDX-License-Identifier: Apache-2.0
"""Shared memory: the native core, the pages drawn byte for byte, the segments that hold them. Imports nothing of pvbus."""
