"""One pythae model on given arrays, in pythae's own environment; benchmarks/train.py and benchmarks/peers/compare.py start it.

    python pythae_peer.py time  --data arrays.npz [...]     waits for lines of JSON on stdin: how long does one epoch take?
    python pythae_peer.py train --data arrays.npz --out result.npz --model vae [...]

arrays.npz holds `train` (N, 1, S, S) uint8: 0/1, or 0..255 with --dynamic, and `val` with 0/1. The network is the one of
vae_nb with a flat code, layer by layer from torch's modules, so that its weights fit there. Loss, loop, optimiser, loader, best
model and samplers are pythae's. Answers are lines of JSON on stdout; everything else goes to stderr.
"""
import argparse, json, math, os, sys, tempfile, time
from importlib import metadata

import numpy as np
import torch
from torch import nn

from pythae.data.datasets import BaseDataset, DatasetOutput
from pythae.models import RAE_L2, VAE, VAMP, BetaVAE, BetaVAEConfig, RAE_L2_Config, VAEConfig, VAMPConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.pipelines import TrainingPipeline
from pythae.samplers import GaussianMixtureSampler, NormalSampler, VAMPSampler
from pythae.trainers import BaseTrainer, BaseTrainerConfig, CoupledOptimizerTrainerConfig
from pythae.trainers.training_callbacks import TrainHistoryCallback

MODELS = ('vae', 'beta_vae', 'rae_l2', 'vamp')


class Block(nn.Module):
    "A residual block before activation."
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(min(8, channels//4), channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight); nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        act = nn.functional.silu
        return x + self.conv2(act(self.conv1(act(self.norm(x)))))


def stages(a):
    "Channels of each stage, and the side of the last map."
    n = int(math.log2(a.size//4))
    return [a.width*min(2**i, 4) for i in range(n)], a.size >> n


class Encoder(BaseEncoder):
    def __init__(self, a):
        super().__init__(); ws, side = stages(a)
        layers = [nn.PixelUnshuffle(2), nn.Conv2d(4, a.width, 3, padding=1)]
        for i, w in enumerate(ws):
            if i: layers += [nn.SiLU(), nn.Conv2d(ws[i-1], w, 2, stride=2)]
            layers += [Block(w) for _ in range(a.depth)]
        self.conv = nn.Sequential(*layers, nn.SiLU())
        self.heads = nn.Sequential(nn.Flatten(), nn.Linear(ws[-1]*side**2, a.hidden), nn.SiLU(), nn.Linear(a.hidden, 2*a.latent_dim))

    def forward(self, x):
        mu, logvar = self.heads(self.conv(2*x - 1)).chunk(2, dim=1)
        return ModelOutput(embedding=mu, log_covariance=logvar.clamp(-16, 4))


class Decoder(BaseDecoder):
    def __init__(self, a):
        super().__init__(); ws, side = stages(a); layers = []
        self.from_code = nn.Sequential(nn.Linear(a.latent_dim, a.hidden), nn.SiLU(), nn.Linear(a.hidden, ws[-1]*side**2),
                                       nn.Unflatten(1, (ws[-1], side, side)))
        for i, w in reversed(list(enumerate(ws))):
            layers += [*[Block(w) for _ in range(a.depth)], nn.SiLU()]
            if i: layers += [nn.Conv2d(w, 4*ws[i-1], 1), nn.PixelShuffle(2)]
        self.conv = nn.Sequential(*layers, nn.Conv2d(a.width, 4, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, z): return ModelOutput(reconstruction=self.conv(self.from_code(z)).sigmoid())


class Drawn(BaseDataset):
    "Pictures drawn black and white afresh whenever they are asked for; `data` holds the probabilities."
    def __getitem__(self, i): return DatasetOutput(data=torch.bernoulli(self.data[i]), labels=self.labels[i])


def as_dataset(x, dynamic=False):
    x = torch.from_numpy(x).float()
    return (Drawn if dynamic else BaseDataset)(x/255 if dynamic else x, torch.zeros(len(x)))


def build(a, name='vae'):
    torch.manual_seed(a.seed); np.random.seed(a.seed)
    shape = dict(input_dim=(1, a.size, a.size), latent_dim=a.latent_dim); bce = dict(reconstruction_loss='bce', **shape)
    kind, config = dict(vae=lambda: (VAE, VAEConfig(**bce)), beta_vae=lambda: (BetaVAE, BetaVAEConfig(beta=a.beta, **bce)),
                        rae_l2=lambda: (RAE_L2, RAE_L2_Config(**shape)),
                        vamp=lambda: (VAMP, VAMPConfig(number_components=a.components, linear_scheduling_steps=a.warmup, **bce)))[name]()
    return kind(config, Encoder(a), Decoder(a))


def count(*parts): return sum(p.numel() for m in parts for p in m.parameters() if p.requires_grad)


def about(model):
    versions = {p: metadata.version(p) for p in ('pythae', 'torch', 'numpy', 'pydantic')}
    return dict(parameters=count(model.encoder, model.decoder), all_parameters=count(model), versions=versions,
                cuda=torch.cuda.is_available())


def training_config(a, out, name='vae', epochs=1):
    c = dict(output_dir=out, num_epochs=epochs, per_device_train_batch_size=a.batch_size, per_device_eval_batch_size=a.batch_size,
             seed=a.seed, learning_rate=a.lr)
    cosine = dict(scheduler_cls='CosineAnnealingLR', scheduler_params=dict(T_max=epochs)) if a.cosine else {}
    if name != 'rae_l2': return BaseTrainerConfig(**c, **cosine)
    halves = {f'{h}_{k}': v for h in ('encoder', 'decoder') for k, v in dict(learning_rate=a.lr, **cosine).items()}
    return CoupledOptimizerTrainerConfig(**c, **halves)


def serve(a, arrays, say):
    "One epoch of `train_step` at each request {dynamic, threads}; the answer holds the seconds it took."
    trainers = {}
    def trainer(dynamic):
        model = build(a); out = tempfile.mkdtemp(dir=a.scratch)
        t = BaseTrainer(model, as_dataset(arrays['train' if dynamic else 'static'], dynamic), training_config=training_config(a, out))
        t.prepare_training(); return t
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    say(about(build(a)))
    for epoch, line in enumerate(sys.stdin, 1):
        request = json.loads(line); dynamic = request['dynamic']
        if request.get('threads'): torch.set_num_threads(request['threads'])
        if dynamic not in trainers: trainers[dynamic] = trainer(dynamic)
        t = trainers[dynamic]; wait(); start = time.perf_counter()
        loss = t.train_step(epoch)
        wait(); seconds = time.perf_counter() - start
        t.callback_handler.on_epoch_end(training_config=t.training_config)       # closes its progress bar
        say(dict(seconds=seconds, images=len(t.train_dataset), steps=len(t.train_loader), loss=loss, threads=torch.get_num_threads()))


@torch.no_grad()
def samples_of(model, name, a, x):
    "{sampler: (n, 1, S, S) probabilities} from pythae's samplers, and the priors behind them."
    found, priors = {}, {}
    if name in ('vae', 'beta_vae'): found['normal'] = NormalSampler(model).sample(a.samples)
    if name == 'vamp':
        found['vamp'] = VAMPSampler(model).sample(a.samples)
        own = model.encoder(model.pseudo_inputs(model.idle_input.to(model.device)).reshape(-1, 1, a.size, a.size))
        priors |= {'vamp/mu': own.embedding, 'vamp/logvar': own.log_covariance}
    else:
        gmm = GaussianMixtureSampler(model); gmm.fit(x.to(gmm.device)); found['gmm'] = gmm.sample(a.samples)
        fitted = dict(weights=gmm.gmm.weights_, means=gmm.gmm.means_, precisions=gmm.gmm.precisions_cholesky_)
        priors |= {f'gmm/{k}': torch.as_tensor(v) for k, v in fitted.items()}
    return found, priors


def train(a, arrays, say):
    model = build(a, a.model); say(about(model)); history = TrainHistoryCallback()
    data = as_dataset(arrays['train'], a.dynamic)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=a.scratch) as out:
        pipeline = TrainingPipeline(model, training_config(a, out, a.model, a.epochs))
        pipeline(data, as_dataset(arrays['val']), callbacks=[history])
    seconds = time.perf_counter() - start
    model = pipeline.trainer._best_model.eval(); losses = [float(v) for v in history.history['eval_loss']]
    x = torch.bernoulli(data.data) if a.dynamic else data.data
    found, priors = samples_of(model, a.model, a, x)
    weights = {k: v for k, v in model.state_dict().items() if k.split('.')[0] in ('encoder', 'decoder')}
    shown = x[:16].to(model.device); res = {f'weights/{k}': v for k, v in weights.items()}
    res |= {f'samples/{k}': v for k, v in found.items()} | {f'priors/{k}': v for k, v in priors.items()}
    with torch.no_grad():                                   # what the network makes of a few pictures: the other side must get the same
        mu = model.encoder(shown).embedding
        res |= {'check/x': shown.to(torch.uint8), 'check/mu': mu, 'check/mean': model.decoder(mu).reconstruction}
    np.savez(a.out, **{k: v.cpu().numpy() for k, v in res.items()})
    say(dict(model=a.model, seconds=seconds, epochs=len(losses), best_epoch=int(np.argmin(losses)) + 1, eval_losses=losses))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=('time', 'train')); p.add_argument('--data', required=True); p.add_argument('--out')
    p.add_argument('--model', choices=MODELS, default='vae'); p.add_argument('--dynamic', action='store_true')
    p.add_argument('--cosine', action='store_true', help='anneal the learning rate with a cosine over the epochs')
    p.add_argument('--scratch', default=None, help='folder for what pythae itself writes')
    for name, default in dict(size=28, width=32, depth=0, hidden=256, latent_dim=40, batch_size=128, epochs=1, components=500, warmup=0,
                              samples=10_000, threads=0, seed=0, lr=1e-3, beta=2.).items():
        p.add_argument('--' + name.replace('_', '-'), type=type(default), default=default)
    a = p.parse_args()
    answers = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1)              # whatever pythae prints joins its log
    def say(reply): answers.write(json.dumps(reply) + '\n'); answers.flush()
    if a.threads: torch.set_num_threads(a.threads)
    with np.load(a.data) as f: arrays = {k: f[k] for k in f.files}
    (serve if a.what == 'time' else train)(a, arrays, say)


if __name__ == '__main__': main()
