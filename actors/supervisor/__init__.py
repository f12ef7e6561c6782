# SPDX-License-Identifier: Apache-2.0
"""The supervisor's room: boots a machine, restarts what dies, stops it; on the path of an event it is not."""
