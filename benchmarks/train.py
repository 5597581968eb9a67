"""Training speed: examples a second of the capacity network by precision and torch.compile; what the signals, the watch that reads
them and the panel that draws them cost.

    python benchmarks/train.py [--device cpu] [--steps 60] [--width 32] [--depth 0] [--batch-size 64] [--threads 2]
    python benchmarks/train.py --images                  # black and white Fashion-MNIST, here and in pythae: make peers

Each row is timed in alternating rounds with the first, so that a busy machine hurts all rows alike; medians are printed. The panel
sets its own pace by the clock, so it has a minute for itself: the time it spent drawing over that minute.
What watch and panel cost: on two idle cores of an Intel Xeon (13.4 ms a step, two threads) signals and watch together 1.81 %, the
watch alone 0.67 %; of a minute with a panel 0.63 % went into drawing it.

With --images a round is one pass over `steps` batches of the same pictures through the same network (flat code) on both sides:
here `Trainer.step` with its signals, averaged weights, clipping and schedule; in pythae `BaseTrainer.train_step`, with Adam and its
loader without workers, in a process of its own that waits while the other side is timed. On a CPU with one thread and with two.

Measured beside pythae 0.1.2 (--images --steps 5 --batch-size 128 --no-compile; two idle cores of an AMD EPYC): 1.14 and 1.28 times
its images a second on one thread, 1.23 and 1.25 times on two (pixels drawn once, and at every step). On an H200 (--images --steps 100
--batch-size 128 --rounds 5 --no-compile; torch 2.11 on both sides) 5.5 and 6.5 times in float32 (136,000 and 127,000 images a second
here), 5.1 and 6.7 times in bfloat16. Before the step was recorded as a CUDA graph it was 3.8 and 4.1 times.
"""
import argparse, contextlib, os, statistics, tempfile, time

import numpy as np, torch
from tqdm import tqdm

from vae_nb.core import UserError, hardware, pick_device
from vae_nb.data.datasets import make_dataset
from vae_nb.data.images import binarise_images, load_images
from vae_nb.models.networks import count_parameters
from vae_nb.runs import EventLog, markdown_table
from vae_nb.training.config import TrainConfig
from vae_nb.training.signals import SignalBuffer, gradient_norms, step_fields
from vae_nb.training.trainer import Progress, Trainer
from vae_nb.training.watch import Panel


class Plain(Trainer):
    "A trainer without signals: it knows the loss and the norm of the gradient, and writes nothing."
    def gradients(self, x, noise, beta):
        with self.autocast: t = self.vae(x, noise)
        loss = self.objective(t, x, beta); self.opt.zero_grad(); loss.backward()
        norm = gradient_norms([p for part in self.parts for p in part])[0]; row = torch.zeros(len(step_fields), device=x.device)
        row[step_fields.index('loss')], row[step_fields.index('grad_norm')] = loss.detach(), norm
        return row

class Silent:
    def add(self, *a, **k): pass

class Still:
    "Stands for JupyterLab, which takes the drawing."
    def update(self, picture): pass


def trainer(a, dataset, folder, signals=True, watch=True, panel=False, **changes):
    c = TrainConfig(width=a.width, depth=a.depth, hidden=a.hidden, batch_size=a.batch_size, device=a.device,
                    focal_gamma=0, class_weights='none', **changes)
    tr = (Trainer if signals else Plain)(c, folder, dataset, 'none'); tr.log = EventLog(f'{folder}/events.jsonl'); tr.bar = Progress(tr)
    if panel:
        p = tr.bar.panel = Panel(); p.handle = Still(); p.show(); p.spent = 0.            # matplotlib is loaded
    if signals and watch: tr.start_watch()
    else: tr.signals = SignalBuffer(tr.log, c.latent_dim, tr.device) if signals else Silent()
    return tr


def seconds(tr, steps):
    order = torch.randperm(len(tr.train), device=tr.device); n = tr.c.batch_size
    if tr.device.type == 'cuda': torch.cuda.synchronize()
    t = time.perf_counter()
    for i in range(steps): tr.step(order[(i*n) % max(1, len(order) - n):][:n])
    if tr.device.type == 'cuda': torch.cuda.synchronize()
    return (time.perf_counter() - t)/steps


def drawing(tr, wanted):
    "Share of `wanted` seconds of training that goes into drawing the panel, which sets its own pace by the clock."
    start = time.perf_counter()
    while (took := time.perf_counter() - start) < wanted: seconds(tr, 20)
    return tr.bar.panel.spent/took


def describe(dev, versions):
    h = hardware(dev); gpu = [h['gpu']] if h['gpu'] else []
    return '; '.join([*gpu, f"{h['cpu']}, {h['cores']} cores", *(f'{k} {v}' for k, v in versions.items()),
                      'load {:.1f} {:.1f} {:.1f}'.format(*os.getloadavg())])


def images(a, dev):
    "Pictures a second here and in pythae: same pictures, network and batch; prints both and their ratio."
    from peers.environment import Peer
    data = {k: binarise_images(load_images('fashion_mnist', limit=a.steps*a.batch_size), k) for k in ('static', 'dynamic')}
    n = len(data['static'].train); steps = -(-n//a.batch_size)
    kinds = {'float32': dict(precision='float32')} | ({'bfloat16': dict(precision='bfloat16')} if dev.type == 'cuda' else {})
    if not a.no_compile: kinds |= {f'{k}, compiled': dict(v, compile=True) for k, v in kinds.items()}
    threads = [a.threads] if a.threads else [1, 2][:hardware()['cores']] if dev.type == 'cpu' else [torch.get_num_threads()]
    shape = ('width', 'depth', 'hidden', 'latent_dim', 'batch_size')
    rows, lr, usual = [], TrainConfig().lr, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as d, contextlib.ExitStack() as stack:
        np.savez(f'{d}/arrays.npz', train=data['dynamic'].train.numpy(), static=data['static'].train.numpy())
        options = [x for k in shape for x in ('--' + k.replace('_', '-'), getattr(a, k))]
        peer = stack.enter_context(Peer('time', '--data', f'{d}/arrays.npz', '--lr', lr, '--scratch', d, *options, device=dev))
        for t in threads:
            torch.set_num_threads(t); torch.compiler.reset()
            for how, ds in data.items():
                ours = {k: trainer(a, ds, f'{d}/{t}-{how}-{i}', data='fashion_mnist', binarise=how, latent_dim=a.latent_dim, code='flat',
                                   lr=lr, **v) for i, (k, v) in enumerate(kinds.items())}
                if (own := count_parameters(ours['float32'].vae)) != peer.hello['parameters']:
                    raise UserError(f"The networks differ: {own:,} parameters here, {peer.hello['parameters']:,} in pythae.")
                sides = {'pythae': lambda how=how, t=t: peer.ask(dynamic=how == 'dynamic', threads=t)['seconds']/n}
                sides |= {k: (lambda tr=tr: seconds(tr, steps)*steps/n) for k, tr in ours.items()}
                times = {k: [] for k in sides}
                about = f"{t} thread{'s'*(t > 1)}, pixels drawn {'once' if how == 'static' else 'at every step'}"
                for r in tqdm(range(a.rounds + 1), desc=about, leave=False, disable=None):     # the first round warms up, and compiles
                    for k in list(sides)[::-1 if r % 2 else 1]:
                        time.sleep(0.05); times[k].append(sides[k]())
                times = {k: v[1:] for k, v in times.items()}; med = {k: statistics.median(v) for k, v in times.items()}
                for k in ours:
                    ratio = [x/y for x, y in zip(times['pythae'], times[k])]
                    rows.append({'threads': t, 'pixels drawn': 'once' if how == 'static' else 'at every step', 'here': k,
                                 'vae_nb, images/s': round(1/med[k]), 'pythae, images/s': round(1/med['pythae']),
                                 'ratio': statistics.median(ratio), 'lowest': min(ratio), 'highest': max(ratio)})
        torch.set_num_threads(usual); versions = peer.hello['versions']
    versions = {'torch': torch.__version__} | {f'pythae {versions["pythae"]} on torch': versions['torch']}
    print(f'{describe(dev, versions)}\nFashion-MNIST, black and white; width {a.width}, depth {a.depth}, hidden {a.hidden}, latent_dim '
          f'{a.latent_dim}, flat code: {own:,} parameters on both sides; batch {a.batch_size}, {a.rounds} rounds of {steps} steps\n')
    print(markdown_table(rows, digits=3))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(steps=60, rounds=7, width=32, depth=0, hidden=256, batch_size=64, threads=0, panel_seconds=60).items():
        p.add_argument('--' + name.replace('_', '-'), type=int, default=default)
    p.add_argument('--device', default='auto'); p.add_argument('--no-compile', action='store_true')
    p.add_argument('--images', action='store_true', help='pictures a second here and in pythae, and their ratio')
    p.add_argument('--latent-dim', type=int, default=40, help='of the network of --images')
    a = p.parse_args()
    if min(a.steps, a.rounds, a.batch_size, a.panel_seconds) < 1:
        p.error('--steps, --rounds, --batch-size and --panel-seconds must be at least 1')
    if a.images and a.steps*a.batch_size > 50_000: p.error('a round takes --steps x --batch-size pictures, and there are 50,000')
    try:
        dev = pick_device(a.device)
        if a.images: return images(a, dev)
    except UserError as e: p.exit(2, f'{e}\n')
    if a.threads: torch.set_num_threads(a.threads)
    data = make_dataset('simplified', 10_000, seed=0)
    kinds = {'float32': dict(precision='float32'), 'float32, signals that nobody reads': dict(precision='float32', watch=False),
             'float32, no signals': dict(precision='float32', signals=False),
             'bfloat16': dict(precision='bfloat16')}
    if not a.no_compile: kinds |= {f'{k}, compiled': dict(precision=k, compile=True) for k in ('float32', 'bfloat16')}
    with tempfile.TemporaryDirectory() as d:
        trainers = {k: trainer(a, data, f'{d}/{i}', **v) for i, (k, v) in enumerate(kinds.items())}
        first = {k: seconds(t, 3) for k, t in trainers.items()}               # warm up, and compile where asked
        times = {k: [] for k in kinds}
        for _ in range(a.rounds):
            for k, t in trainers.items(): times[k].append(seconds(t, a.steps))
        share = drawing(trainer(a, data, f'{d}/panel', precision='float32', panel=True), a.panel_seconds)
    med = {k: statistics.median(v) for k, v in times.items()}; base = med['float32']
    ratio = {k: statistics.median(x/y for x, y in zip(times[k], times['float32'])) for k in kinds}
    where = torch.cuda.get_device_name(dev) if dev.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'
    print(f'{where}; width {a.width}, depth {a.depth}, hidden {a.hidden}, batch {a.batch_size}, {a.rounds} rounds of {a.steps} steps\n')
    print(markdown_table([{'variant': k, 'ms a step': m*1e3, 'examples/s': round(a.batch_size/m), 'step time over float32': ratio[k],
                           'first three steps, s a step': first[k]} for k, m in med.items()]))
    cost = lambda less, more: statistics.median(1 - y/x for x, y in zip(times[more], times[less]))
    print(f'\nSignals and watch cost {cost("float32, no signals", "float32"):.2%} of a step ({base*1e3:.2f} ms), the watch alone '
          f'{cost("float32, signals that nobody reads", "float32"):.2%}. In {a.panel_seconds} s of a training with a panel, {share:.2%} '
          'went into drawing it.')


if __name__ == '__main__': main()
