# SPDX-License-Identifier: Apache-2.0
"""Placeholder being replaced."""
import argparse
from pathlib import Path
def parser():
    p=argparse.ArgumentParser(); s=p.add_subparsers(dest="verb"); u=s.add_parser("up"); u.add_argument("--name"); u.add_argument("--config",type=Path); u.add_argument("--detach",action="store_true"); return p
def run(a): return 2
