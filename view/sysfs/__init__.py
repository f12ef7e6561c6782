# SPDX-License-Identifier: Apache-2.0
"""What sysfs and the kernel's uevents show of a domain's VMBus, for programs that know nothing of us."""
