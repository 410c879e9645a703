# Copyright 2026 The peft-scl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A small vision transformer for `federated_images.py` where no pretrained one is at hand, from a `.npz` of MedMNIST.

    python recipes/offline/train_vit.py --data pneumoniamnist.npz --output_dir vit

It learns to tell by how many quarter turns an image was rotated (Gidaris et al., 2018), without the labels, on one
half of the training split. The other half and the test split go into `federated.npz`, so that no client has an
image that the model knows. Writes the model with its image processor to `model`. Some minutes on one core.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    arrays = np.load(args.data)
    order = np.random.default_rng(args.seed).permutation(len(arrays["train_images"]))
    ours, theirs = order[: len(order) // 2], order[len(order) // 2 :]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rest = {f"train_{kind}": arrays[f"train_{kind}"][theirs] for kind in ("images", "labels")}
    rest |= {f"test_{kind}": arrays[f"test_{kind}"] for kind in ("images", "labels")}
    np.savez_compressed(args.output_dir / "federated.npz", **rest)

    side = arrays["train_images"].shape[1]
    config = ViTConfig(  # type: ignore[call-arg]
        image_size=side,
        patch_size=4,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=4,
    )
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps)
    images = torch.from_numpy(arrays["train_images"][ours]).float() / 127.5 - 1  # as the processor does it
    if images.ndim == 3:
        images = images[..., None].expand(-1, -1, -1, 3)
    images = images.permute(0, 3, 1, 2)
    hits = []
    for step in range(1, args.steps + 1):
        batch = images[torch.randint(len(images), (args.batch,))]
        turns = torch.randint(4, (args.batch,))
        turned = torch.stack([torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(batch, turns, strict=True)])
        logits = model(pixel_values=turned).logits
        cross_entropy(logits, turns).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        hits.append((logits.argmax(-1) == turns).float().mean().item())
        if step % 100 == 0:
            print(
                f"step {step}: accuracy of the rotation over the last 100 steps {np.mean(hits[-100:]):.3f}", flush=True
            )

    model.save_pretrained(args.output_dir / "model")
    size = {"height": side, "width": side}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
        args.output_dir / "model"
    )


if __name__ == "__main__":
    main()
