# SPDX-License-Identifier: Apache-2.0
"""`pvbus run`: a command in namespaces of its own, in which the devices of a machine are in place."""
