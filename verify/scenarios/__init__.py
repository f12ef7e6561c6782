# SPDX-License-Identifier: Apache-2.0
"""Scenarios for the explorer, one file each: pages, contexts, and what must hold. Room logic and the
explored core only.
"""
