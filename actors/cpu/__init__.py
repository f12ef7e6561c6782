# SPDX-License-Identifier: Apache-2.0
"""A virtual CPU's room: upcalls in interrupt context, in a process of their own."""
