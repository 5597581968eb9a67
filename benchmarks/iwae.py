"""How long an importance-weighted bound takes: K samples for each of N test pictures, as the default network and compiled.

    python benchmarks/iwae.py [--K 5000] [--examples 10000] [--network conv|hierarchical] [--width 64] [--depth 2] [--plain]

The network is as initialised: the time does not depend on what it learned. `fast` compiles it, and runs it in bfloat16 on a GPU; its
first call, which compiles, is not counted. With --plain the float32 network is timed as well.

Measured on an H200 (torch 2.11): K = 1,000 for 1,000 pictures takes the convolutional network of width 64 and depth 2 2.2 s in float32 and
0.6 s compiled, so 5,000 samples for all 10,000 take 108 s and 29 s. The hierarchical one with eight groups needs three times as long in
float32; compiled, while another program used the GPU, 24 to 26 s for K = 1,000 on all 10,000.
"""
import argparse, os, time

import torch

from vae_nb.core import UserError, hardware, pick_device
from vae_nb.data.images import binarise_images, load_images
from vae_nb.evaluation.bounds import iwae
from vae_nb.models.networks import count_parameters
from vae_nb.runs import markdown_table
from vae_nb.training.config import TrainConfig
from vae_nb.training.trainer import build_vae, model_shape


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(K=5000, examples=10_000, width=64, depth=2, hidden=512, latent_dim=40, groups=8, latent_channels=2).items():
        p.add_argument('--' + name.replace('_', '-'), type=int, default=default)
    p.add_argument('--network', default='conv', choices=('conv', 'hierarchical')); p.add_argument('--device', default='auto')
    p.add_argument('--plain', action='store_true', help='time the float32 network as well, not compiled')
    a = p.parse_args()
    if min(a.K, a.examples) < 1: p.error('--K and --examples must be at least 1')
    shape = ('network', 'width', 'depth', 'hidden', 'latent_dim', 'groups', 'latent_channels')
    try:
        device = pick_device(a.device); data = binarise_images(load_images('fashion_mnist'), 'dynamic')
        c = TrainConfig(data='fashion_mnist', binarise='dynamic', **{k: getattr(a, k) for k in shape})
    except UserError as e: p.exit(2, f'{e}\n')
    torch.manual_seed(0); vae = build_vae(c.model_dump(), model_shape(data)).to(device).eval(); x = data.test[:a.examples].to(device)
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    rows = []
    for fast in [False]*a.plain + [True]:
        if fast: iwae(vae, x[:min(len(x), 1000)], a.K, fast=True)         # compiles for these sizes
        wait(); start = time.perf_counter(); r = iwae(vae, x, a.K, fast=fast, progress=True); wait()
        rows.append({'network': a.network, 'computed': 'fast' if fast else 'float32', 'K': a.K, 'pictures': len(x),
                     's': round(time.perf_counter() - start, 1), 'nats': r['nll']})
    h = hardware(device)
    print(f"{h['gpu'] or h['cpu']}; torch {torch.__version__}; {count_parameters(vae):,} parameters; load {os.getloadavg()[0]:.1f}\n")
    print(markdown_table(rows, digits=6))


if __name__ == '__main__': main()
