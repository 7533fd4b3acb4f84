"""Trains an adapter with T5X. The command is at the head of configs/gin/runs/finetune.gin, the guide is docs/t5x.md.

  python scripts/t5x_train.py --gin_file=models/t5_1_1.gin --gin_file=sizes/t5_1_1_small.gin --gin_file=adapters/sira.gin \\
    --gin_file=runs/finetune.gin --gin.NAME=VALUE ...
"""

from scripts.t5x_launch import launch

if __name__ == "__main__":
    launch("train")
