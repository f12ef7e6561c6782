# SPDX-License-Identifier: Apache-2.0
"""An open file's room: what the driver keeps per open, from open to release."""
