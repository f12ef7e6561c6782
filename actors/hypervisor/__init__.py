# SPDX-License-Identifier: Apache-2.0
"""The hypervisor's room: domains, ports and events; the one consumer of all submission rings."""
