# SPDX-License-Identifier: Apache-2.0
"""The workqueue process of a domain on the Hyper-V platform: the guest side of VMBus, and the bus with its drivers."""
