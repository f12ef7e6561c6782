# SPDX-License-Identifier: Apache-2.0
"""The process runtime: actors in processes of their own, frames between them, time, start and stop.

Nothing is imported here: each user names the module it needs, so that a client does not load what only a
child needs.
"""
