# SPDX-License-Identifier: Apache-2.0
"""The VMBus host of a domain: the protocol server, and the synthetic devices that it offers. All pure."""
