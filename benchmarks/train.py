"""Training speed: examples a second of the capacity network by precision and torch.compile, and what the signals cost.

    python benchmarks/train.py [--device cpu] [--steps 60] [--width 32] [--depth 0] [--batch-size 64] [--threads 2]

Each row is timed in alternating rounds with the first, so that a busy machine hurts all rows alike; medians are printed.
"""
import argparse, statistics, tempfile, time

import torch

from vae_nb.core import pick_device
from vae_nb.data.datasets import make_dataset
from vae_nb.runs import EventLog, markdown_table
from vae_nb.training.config import TrainConfig
from vae_nb.training.signals import SignalBuffer
from vae_nb.training.trainer import Trainer


class Silent:
    "A signal buffer that does nothing: what a step costs without signals."
    def add(self, t, loss, *a, **k): return torch.stack([loss.detach(), t.nll.detach().mean(), t.kl.detach().sum(1).mean()])
    def flush(self): pass
    def restart(self): pass


def trainer(a, data, folder, signals=True, **changes):
    c = TrainConfig(width=a.width, depth=a.depth, hidden=a.hidden, batch_size=a.batch_size, device=a.device,
                    focal_gamma=0, class_weights='none', **changes)
    tr = Trainer(c, folder, data, 'none'); tr.log = EventLog(f'{folder}/events.jsonl')
    tr.signals = SignalBuffer(tr.log, c.latent_dim, tr.device) if signals else Silent()
    return tr


def seconds(tr, steps):
    order = torch.randperm(len(tr.train), device=tr.device); n = tr.c.batch_size
    if tr.device.type == 'cuda': torch.cuda.synchronize()
    t = time.perf_counter()
    for i in range(steps): tr.step(order[(i*n) % (len(order) - n):][:n])
    if tr.device.type == 'cuda': torch.cuda.synchronize()
    return (time.perf_counter() - t)/steps


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in dict(steps=60, rounds=7, width=32, depth=0, hidden=256, batch_size=64, threads=0).items():
        p.add_argument('--' + name.replace('_', '-'), type=int, default=default)
    p.add_argument('--device', default='auto'); p.add_argument('--no-compile', action='store_true')
    a = p.parse_args(); dev = pick_device(a.device)
    if a.threads: torch.set_num_threads(a.threads)
    data = make_dataset('simplified', 10_000, seed=0)
    kinds = {'float32': dict(precision='float32'), 'float32, no signals': dict(precision='float32', signals=False),
             'bfloat16': dict(precision='bfloat16')}
    if not a.no_compile: kinds |= {f'{k}, compiled': dict(precision=k, compile=True) for k in ('float32', 'bfloat16')}
    with tempfile.TemporaryDirectory() as d:
        trainers = {k: trainer(a, data, f'{d}/{i}', **v) for i, (k, v) in enumerate(kinds.items())}
        first = {k: seconds(t, 3) for k, t in trainers.items()}               # warm up, and compile where asked
        times = {k: [] for k in kinds}
        for _ in range(a.rounds):
            for k, t in trainers.items(): times[k].append(seconds(t, a.steps))
    med = {k: statistics.median(v) for k, v in times.items()}; base = med['float32']
    ratio = {k: statistics.median(x/y for x, y in zip(times[k], times['float32'])) for k in kinds}
    where = torch.cuda.get_device_name(dev) if dev.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{where}; width {a.width}, depth {a.depth}, hidden {a.hidden}, batch {a.batch_size}, {a.rounds} rounds of {a.steps} steps\n')
    print(markdown_table([{'variant': k, 'ms a step': m*1e3, 'examples/s': round(a.batch_size/m), 'step time over float32': ratio[k],
                           'first three steps, s a step': first[k]} for k, m in med.items()]))
    cost = statistics.median(1 - y/x for x, y in zip(times['float32'], times['float32, no signals']))
    print(f'\nSignals cost {cost:.2%} of a step ({base*1e3:.2f} ms).')


if __name__ == '__main__': main()
