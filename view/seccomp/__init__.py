# SPDX-License-Identifier: Apache-2.0
"""The seccomp front end: unmodified programs whose openat of /dev/xen/evtchn is answered with an injected descriptor."""
