# SPDX-License-Identifier: Apache-2.0
"""What tests the machine: stress today; scenarios, histories and the explorer beside it.

It uses the machine through the client, and rooms through their pure logic; never a `process.py`.
"""
