"""vae_nb and pythae on black and white Fashion-MNIST: same network, pictures, epochs and metrics; one Markdown table.

    python benchmarks/peers/compare.py [--epochs 100] [--device auto]            (first: make peers)
    python benchmarks/peers/compare.py --epochs 1 --train-limit 2000 --test-limit 500 --samples 500 --K 10       a trial run

Trained: vae_nb, and pythae's VAE, beta-VAE, RAE-L2 and VAMP, one after the other. The network is `vae_nb`'s with a flat code on both
sides (the parameter counts are compared, and so is what it computes from the same weights). pythae gets Adam at the learning rate
of vae_nb's AdamW with a cosine over the epochs, the training pictures drawn anew at every step, its own best model on the validation
set and its own samplers. Its trained weights are then read into a vae_nb network, so that one function measures every likelihood:
IWAE-K and the NELBO (IWAE-1) on the test set, under the prior named in the row. RAE-L2 has no likelihood. pythae's VAMP sampler draws
with the tanh of the prior's log-variances; its likelihood is that of the prior as trained. Distances are those of vae_nb, against black
and white test pictures, with `--pixels drawn` (black and white draws from every decoder's probabilities, like against like) or `mean`
(the probabilities as grey levels: smoother, but another kind of picture than the test set's).

Measured on an H200 (--epochs 15 --set beta_schedule=constant --set precision=float32; torch 2.11 on both sides, one random seed, real
against real 0.03). vae_nb does not win every column: with the same prior it is ahead of pythae's VAE in nats by a little, behind in FD;
pythae's VAMP, whose prior is learned with the model, has the best bound, RAE-L2 the best FD and recall. At equal network and
epochs what separates the rows is the prior, not the library.

| model | codes from | IWAE-1000, nats | NELBO, nats | FD-44f637 | precision | recall | density | coverage |
|---|---|---:|---:|---:|---:|---:|---:|---:|
| vae_nb | standard | 233.2 | 235.7 | 3.77 | 0.781 | 0.899 | 0.603 | 0.705 |
| vae_nb | gmm | 231.7 | 234.3 | 0.516 | 0.910 | 0.879 | 0.941 | 0.914 |
| vae_nb | flow | 231.5 | 234.0 | 0.547 | 0.906 | 0.889 | 0.934 | 0.925 |
| pythae VAE | normal | 233.6 | 236.2 | 3.56 | 0.775 | 0.903 | 0.579 | 0.676 |
| pythae VAE | gmm | 232.0 | 234.6 | 0.423 | 0.912 | 0.886 | 0.968 | 0.921 |
| pythae beta-VAE | normal | 235.8 | 239.3 | 2.68 | 0.846 | 0.863 | 0.770 | 0.791 |
| pythae beta-VAE | gmm | 235.0 | 238.6 | 0.690 | 0.931 | 0.832 | 1.05 | 0.919 |
| pythae RAE-L2 | gmm | - | - | 0.272 | 0.857 | 0.925 | 0.717 | 0.856 |
| pythae VAMP | vamp | 230.8 | 233.3 | 0.954 | 0.936 | 0.865 | 1.08 | 0.959 |

The standard error of the bounds over test pictures is 0.76 nats; between rows it is far smaller, the pictures being the same.
"""
import argparse, time
from pathlib import Path

import numpy as np, torch

from environment import Peer
from vae_nb.core import UserError, hardware, load_settings, new_generator, pick_device, to_jsonable, utc_now, versions, write_json
from vae_nb.data.images import binarise_images, load_images
from vae_nb.evaluation.bounds import iwae
from vae_nb.evaluation.features import features_of, get_features
from vae_nb.evaluation.image_metrics import sample_distances
from vae_nb.models.networks import count_parameters
from vae_nb.models.pixels import to_uint8
from vae_nb.models.priors import GmmPrior, VampPrior, fit_prior
from vae_nb.runs import markdown_table
from vae_nb.training.config import make_config
from vae_nb.training.trainer import build_vae, fit, load_vae, model_shape

PEERS = dict(vae='VAE', beta_vae='beta-VAE', rae_l2='RAE-L2', vamp='VAMP')
SHAPE = ('width', 'depth', 'hidden', 'latent_dim', 'batch_size', 'epochs', 'lr', 'seed')


def our_config(a):
    fixed = dict(data='fashion_mnist', binarise='dynamic', likelihood='bernoulli', code='flat', device=a.device,
                 **{k: getattr(a, k) for k in SHAPE})
    for k in a.set:
        name, sep, value = k.partition('=')
        if not sep or name in fixed:
            raise UserError(f"--set {k!r} does not work: give NAME=VALUE of a field other than {', '.join(fixed)}.")
        fixed[name] = value
    return make_config(fixed, '--set')


def ours(a, data, out, device):
    "Train here; returns the network and a record."
    start = time.perf_counter(); summary = fit(our_config(a), out/'vae_nb', data, 'lines')
    vae = load_vae(out/'vae_nb', device=str(device))
    return vae, dict(seconds=time.perf_counter() - start, best_epoch=summary['best_epoch'], epochs=summary['epochs'])


@torch.no_grad()
def our_samples(vae, prior, n, seed, device):
    "Probabilities of `n` pictures from codes of a prior."
    z = prior.sample(n, new_generator(seed, 'compare', prior.name, device=device), device)
    return torch.cat([vae.likelihood.mean(vae.decode(b)).cpu() for b in z.split(500)])


@torch.no_grad()
def posteriors(vae, x, seed):
    "Means and log-variances of all training pictures, each drawn black and white once."
    g = new_generator(seed, 'compare', 'posteriors', device=x.device)
    parts = [vae.encode(torch.bernoulli(b.float()/255, generator=g).to(torch.uint8)) for b in x.split(1000)]
    return [torch.cat(p) for p in zip(*parts)]


def theirs(a, name, out, blank, device):
    "Train pythae's model `name`; returns its network as one of ours, {sampler: probabilities}, {sampler: prior} and a record."
    result = out/f'{name}.npz'; options = [x for k in SHAPE for x in ('--' + k.replace('_', '-'), getattr(a, k))]
    options += ['--samples', a.samples, '--components', a.components, '--warmup', a.warmup, '--beta', a.beta, '--scratch', out]
    with Peer('train', '--data', out/'arrays.npz', '--out', result, '--model', name, '--dynamic', '--cosine', *options, device=device,
              log=out/f'{name}.log') as peer:
        if peer.hello['parameters'] != count_parameters(blank):
            raise UserError(f"The networks differ: {count_parameters(blank):,} parameters here, {peer.hello['parameters']:,} in pythae.")
        record = peer.read() | peer.hello
    with np.load(result) as f: found = {k: torch.from_numpy(f[k]) for k in f.files}
    part = lambda p: {k.removeprefix(p + '/'): v for k, v in found.items() if k.startswith(p + '/')}
    blank.load_state_dict(part('weights')); check_network(blank, **part('check'), name=name)
    return blank, part('samples'), priors_of(part('priors'), a.latent_dim), record


@torch.no_grad()
def check_network(vae, x, mu, mean, name):
    "The weights must mean the same here as there."
    device = next(vae.parameters()).device; x, mu = x.to(device), mu.to(device)
    codes = (vae.encode(x)[0] - mu).abs().max().item()/max(1, mu.abs().max().item())
    pixels = (vae.likelihood.mean(vae.decode(mu)).cpu() - mean).abs().max().item()
    if not max(codes, pixels) < 1e-2:              # a GPU computes convolutions in TF32
        raise UserError(f"The network of pythae's {name} computes something else here (codes off by {codes:.2g}, pixels by {pixels:.2g}).")


def priors_of(p, dim):
    "pythae's priors as ours, so that their densities come from the same code. None: the standard normal."
    res = dict(normal=None)
    if 'gmm/weights' in p:
        res['gmm'] = GmmPrior(dim, len(p['gmm/weights']))
        res['gmm'].load_state_dict(dict(logits=p['gmm/weights'].log(), means=p['gmm/means'], precisions=p['gmm/precisions']))
    if 'vamp/mu' in p:
        res['vamp'] = VampPrior(dim, len(p['vamp/mu'])); res['vamp'].load_state_dict(dict(means=p['vamp/mu'], logvars=p['vamp/logvar']))
    return {k: v.requires_grad_(False) if v is not None else None for k, v in res.items()}


class Judge:
    "The same measurements for every row."
    def __init__(self, a, data, device):
        self.a, self.device, self.x = a, device, data.test.to(device)
        self.net = get_features(data, a.seed).to(device)
        self.features = lambda x: features_of(self.net, x).to(device)
        n = min(a.samples, len(data.test)); self.real = self.features(data.test[:n]*255)
        self.ceiling = sample_distances(self.features(data.val[:n]*255), self.real)

    def distances(self, p, name):
        g = new_generator(self.a.seed, 'compare', 'pixels', name)
        x = to_uint8(p) if self.a.pixels == 'mean' else torch.bernoulli(p, generator=g).to(torch.uint8)*255
        return sample_distances(self.real, self.features(x))

    def likelihood(self, vae, prior):
        log_prior = None if prior is None else prior.to(self.device).log_prob
        bound = {K: iwae(vae, self.x, K, self.a.seed, log_prior=log_prior, progress=K > 100) for K in (1, self.a.K)}
        return dict(nelbo=bound[1]['nll'], nll=bound[self.a.K]['nll'], se=bound[self.a.K]['nll_se'], ess=bound[self.a.K]['ess'])

    def row(self, who, prior_name, vae=None, prior=None, samples=None, record=None):
        r = record or {}; lik = self.likelihood(vae, prior) if vae is not None else {}
        d = self.ceiling if samples is None else self.distances(samples, who + prior_name)
        return {'model': who, 'codes from': prior_name, f'IWAE-{self.a.K}, nats': lik.get('nll'), '± se': lik.get('se'),
                'ESS': lik.get('ess'), 'NELBO, nats': lik.get('nelbo'), self.net.name: d['fd'],
                **{k: d[k] for k in ('precision', 'recall', 'density', 'coverage')},
                'best epoch': r.get('best_epoch'), 'training, s': r.get('seconds')}


def compare(a):
    device = pick_device(a.device); out = Path(a.out or load_settings().runs/'peers'/utc_now().replace(':', ''))
    out.mkdir(parents=True, exist_ok=True)
    if (out/'arrays.npz').exists():
        raise UserError(f"{out} holds a comparison already: choose another folder, or delete that one.")
    data = binarise_images(load_images('fashion_mnist'), 'dynamic')
    cut = lambda x, n: x[:n] if n else x
    data.train, data.val, data.test = cut(data.train, a.train_limit), cut(data.val, a.test_limit), cut(data.test, a.test_limit)
    data.labels = {k: v[:len(getattr(data, k))] for k, v in data.labels.items()}
    np.savez(out/'arrays.npz', train=data.train.numpy(), val=data.val.numpy())
    judge = Judge(a, data, device); rows, records = [judge.row('real (validation)', '–')], {}

    config, n = our_config(a), min(a.samples, len(data.test))
    fresh = lambda: build_vae(config.model_dump(), model_shape(data)).to(device).eval()
    if 'vae_nb' in a.models:
        own, records['vae_nb'] = ours(a, data, out, device)
        mu, logvar = posteriors(own, data.train.to(device), a.seed)
        for name in ('standard', *a.priors):
            prior = fit_prior(name, mu, logvar, a.seed)
            painted = our_samples(own, prior, n, a.seed, device)
            rows.append(judge.row('vae_nb', name, own, prior, painted, records['vae_nb']))
    for name in (m for m in PEERS if m in a.models):
        vae, samples, priors, records[name] = theirs(a, name, out, fresh(), device)
        for sampler, p in samples.items():
            likely = None if name == 'rae_l2' else vae
            rows.append(judge.row(f'pythae {PEERS[name]}', sampler, likely, priors[sampler], p[:n], records[name]))

    about = dict(finished=utc_now(), options=vars(a), config=config.model_dump(), hardware=hardware(device), versions=versions(),
                 features=judge.net.record, parameters=count_parameters(fresh()), split=data.meta['split_hash'], sizes=data.sizes)
    write_json(out/'results.json', to_jsonable(dict(rows=rows, records=records, about=about)))
    print(headline(a, data, about, records), markdown_table(rows), f'\nWritten to {out}.', sep='\n')


def headline(a, data, about, records):
    h = about['hardware']; peer = next((r['versions'] for k, r in records.items() if k != 'vae_nb'), {})
    there = ', '.join(f'{k} {v}' for k, v in peer.items()) or 'nothing'
    return (f"Fashion-MNIST, dynamically binarised, {data.sizes}, split {about['split']}; {a.epochs} epochs, batch {a.batch_size}, "
            f"lr {a.lr:g}, seed {a.seed}; width {a.width}, depth {a.depth}, hidden {a.hidden}, latent_dim {a.latent_dim}, flat code: "
            f"{about['parameters']:,} parameters of encoder and decoder in every model\n"
            f"{h['gpu'] or h['cpu']}; torch {torch.__version__}; {there} on the other side. "
            f"beta {a.beta:g}, {a.components} VAMP components, warm-up {a.warmup} epochs; pictures: {a.pixels}, "
            f"{min(a.samples, len(data.test))} of each kind; features right on {about['features']['accuracy']:.1%} of test pictures\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='+', default=['vae_nb', *PEERS], choices=['vae_nb', *PEERS])
    p.add_argument('--priors', nargs='*', default=['gmm', 'flow'], choices=('gmm', 'vamp', 'flow', 'two_stage'),
                   help="fitted to vae_nb's codes")
    p.add_argument('--pixels', default='drawn', choices=('mean', 'drawn'), help='what the distances look at')
    p.add_argument('--set', action='append', default=[], metavar='NAME=VALUE', help="another field of vae_nb's training configuration")
    p.add_argument('--device', default='auto')
    p.add_argument('--out', help='folder for weights, samples and results.json; default: below runs/peers')
    for name, default in dict(epochs=100, train_limit=0, test_limit=0, samples=10_000, K=1000, width=32, depth=0, hidden=256, latent_dim=40,
                              batch_size=128, lr=1e-3, beta=2., components=500, warmup=5, seed=0).items():
        p.add_argument('--' + name.replace('_', '-'), type=type(default), default=default)
    a = p.parse_args()
    try: compare(a)
    except UserError as e: p.exit(2, f'{e}\n')


if __name__ == '__main__': main()
