# SPDX-License-Identifier: Apache-2.0
"""What shows the machine to the outside: explain, status, the pytest plugin.

A view is a user of the machine, not a part of it: it goes through the client and owns no data.
"""
