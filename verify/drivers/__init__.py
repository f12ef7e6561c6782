# SPDX-License-Identifier: Apache-2.0
"""Drivers of the host's synthetic devices as user processes: examples to read, programs to run, and tests.

    python -m pvbus.verify.drivers.heartbeat [--name MACHINE] [--domain D]

Written against the client alone: nothing of the host's own code may be imported here.
"""
