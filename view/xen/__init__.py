# SPDX-License-Identifier: Apache-2.0
"""What stands beside the event channels on a Xen host, as far as real tools need it: privcmd, xenbus, a xenstored that runs."""
