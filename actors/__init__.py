# SPDX-License-Identifier: Apache-2.0
"""The processes of the machine, a room each, and what they share (`runtime`).

Nothing is imported here: a child loads its room only.
"""
