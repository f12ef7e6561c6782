# SPDX-License-Identifier: Apache-2.0
"""FUSE without a library: the protocol of /dev/fuse, and trees of nodes that answer it."""
