"Training as a program: killed, stopped, tracked, refused."
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file

from vae_nb.core import read_json
from vae_nb.data.datasets import class_counts, load_dataset, make_dataset, save_dataset
from vae_nb.models.objective import class_weights
from vae_nb.runs import read_events
from vae_nb.training.trainer import Trainer
from vae_nb.training.config import TrainConfig

SMALL = '--epochs 4 --width 8 --depth 0 --latent-dim 16 --device cpu --batch-size 64 --lr 0.003'.split()
ENV = os.environ | dict(OMP_NUM_THREADS='1')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('data')/'simplified_dataset_2k.npz'
    save_dataset(path, make_dataset('simplified', 2000, seed=0))
    return path


def command(data, out, *more): return [sys.executable, '-m', 'vae_nb.train', '--data-path', str(data), *SMALL, '--out', str(out), *more]


def latest(out):
    folder = read_json(Path(out)/'checkpoint'/'latest.json')['folder']
    return {n: load_file(Path(out)/'checkpoint'/folder/f'{n}.safetensors') for n in ('model', 'ema')}


def wait_for_step(out, step, proc, limit=60):
    "Until the log of a running training has reached `step`."
    end = time.time() + limit
    while time.time() < end and proc.poll() is None:
        if any(e['step'] >= step for e in read_events(Path(out)/'events.jsonl', 'step')): return
        time.sleep(0.01)
    assert proc.poll() is None, proc.stderr.read()


def test_killed_and_continued_gives_the_same_weights(data, tmp_path):
    subprocess.run(command(data, tmp_path/'whole', '--checkpoint-minutes', '5'), env=ENV, check=True, capture_output=True)
    for kill_at in (3, 37, 71):         # SIGKILL in three epochs, at whatever moment it strikes
        p = subprocess.Popen(command(data, tmp_path/'killed', '--checkpoint-minutes', '0'), env=ENV,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for_step(tmp_path/'killed', kill_at, p)
        p.send_signal(signal.SIGKILL); assert p.wait() == -signal.SIGKILL; p.stderr.close()
        assert not (tmp_path/'killed'/'metrics.json').exists()
    subprocess.run(command(data, tmp_path/'killed', '--checkpoint-minutes', '0'), env=ENV, check=True, capture_output=True)
    a, b = latest(tmp_path/'whole'), latest(tmp_path/'killed')
    for part in a: assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    best = [load_file(tmp_path/n/'checkpoint'/'best.safetensors') for n in ('whole', 'killed')]
    assert all(torch.equal(best[0][k], best[1][k]) for k in best[0])
    steps = [e['step'] for e in read_events(tmp_path/'killed'/'events.jsonl', 'step')]
    assert steps == list(range(100)) and len(read_events(tmp_path/'killed'/'events.jsonl', 'resumed')) >= 1
    strip = lambda m: {k: v for k, v in m['metrics'].items() if 'seconds' not in k}
    assert strip(read_json(tmp_path/'whole'/'metrics.json')) == strip(read_json(tmp_path/'killed'/'metrics.json'))


def test_sigterm_saves_says_so_and_goes_on(data, tmp_path):
    p = subprocess.Popen(command(data, tmp_path/'run', '--epochs', '400', '--patience', '0'), env=ENV,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path/'run', 50, p); p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'Stopped by SIGTERM' in err and 'Traceback' not in err
    assert (tmp_path/'run'/'checkpoint'/'latest.json').exists() and not (tmp_path/'run'/'metrics.json').exists()


@pytest.mark.parametrize('extra, said', [
    (['--beta-schedule', 'constnat'], 'constnat'), (['--beta-max', '-1'], 'beta'), (['--bata-max', '1'], '--beta-max'),
    (['--data-path', 'nowhere.npz'], 'vae-nb generate --out nowhere.npz'), (['--device', 'cuda:7'], 'cuda:7'),
    (['--augment', 'rotation'], 'rotate')])
def test_bad_input_is_one_sentence(data, tmp_path, extra, said):
    p = subprocess.run(command(data, tmp_path/'run', *extra), env=ENV, capture_output=True, text=True)
    assert p.returncode == 2 and said in p.stderr and 'Traceback' not in p.stderr
    assert not (tmp_path/'run'/'config.json').exists()


def test_class_weights_come_from_the_whole_training_set(data, tmp_path):
    ds = load_dataset(data); tr = Trainer(TrainConfig(device='cpu', width=8), tmp_path, ds, 'none')
    assert torch.equal(tr.objective.weights, class_weights(class_counts(ds.train, 10), 'inverse_sqrt'))
    assert not torch.equal(tr.objective.weights, class_weights(class_counts(ds.train[:128], 10), 'inverse_sqrt'))


def test_defaults_are_the_briefs():
    c = TrainConfig(beta_schedule='constant', beta_max=0.)
    assert (c.focal_gamma, c.class_weights, c.patience, c.data_path) == (2., 'inverse_sqrt', 20, 'data/simplified_dataset_100k.npz')


@pytest.mark.parametrize('kinds', ['rotate,flip', 'rotate,flip,colours'])
def test_trains_with_augmentation(data, tmp_path, kinds):
    from vae_nb.training.trainer import fit
    r = fit(dict(epochs=1, width=8, depth=0, latent_dim=16, augment=kinds, device='cpu'), tmp_path/'run', load_dataset(data), 'none')
    assert r['status'] == 'epochs' and r['nonfinite'] == 0


def test_wandb_offline_for_real(data, tmp_path):
    pytest.importorskip('wandb')
    env = ENV | dict(WANDB_MODE='offline', WANDB_SILENT='true')
    options = ['--tracker', 'wandb', '--beta-schedule', 'constant', '--beta-max', '0.0', '--image-every', '2']
    subprocess.run(command(data, tmp_path/'run', *options), env=env, check=True, capture_output=True, timeout=300)
    files = list((tmp_path/'run').rglob('*.wandb')); assert len(files) == 1
    raw = files[0].read_bytes()           # W&B's own log of records; names, tags and keys stand in it as text
    wanted = ['simplified-dataset-beta0-capacity-validation', 'simplified-dataset', 'capacity-validation', 'beta-disabled',
              'pixel_accuracy', 'reconstruction_loss', 'kl_divergence', 'per_class_accuracy/0', 'reconstructions']
    assert [w for w in wanted if w.encode() not in raw] == []
    assert len(list((tmp_path/'run').rglob('media/images/*.png'))) == 2         # epochs 2 and 4
    assert read_json(tmp_path/'run'/'metrics.json')['metrics']['tracker_errors'] == 0


def test_a_failing_tracker_does_not_fail_the_run(data, tmp_path, monkeypatch):
    from vae_nb.training import tracking
    from vae_nb.training.trainer import fit
    class Down:
        def __init__(self, c, folder): pass
        def log(self, *a): raise ConnectionError('no route to the dashboard')
        image = log
        def finish(self): raise ConnectionError('still none')
    monkeypatch.setitem(tracking.trackers, 'tensorboard', Down)
    with pytest.warns(UserWarning, match='training goes on without it'):
        r = fit(dict(epochs=2, width=8, depth=0, latent_dim=16, tracker='tensorboard', device='cpu'),
                tmp_path/'run', load_dataset(data), 'none')
    assert r['status'] == 'epochs' and r['tracker_errors'] >= 1


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    again = command(data, tmp_path/'run', '--epochs', '400', '--checkpoint-minutes', '0')
    p = subprocess.Popen(again, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(tmp_path/'run', 30, p); p.kill(); p.wait()
    folder = read_json(tmp_path/'run'/'checkpoint'/'latest.json')['folder']
    (tmp_path/'run'/'checkpoint'/folder/'optimiser.pt').write_bytes(b'not a checkpoint')
    p = subprocess.run(again, env=ENV, capture_output=True, text=True)
    assert p.returncode == 2 and 'cannot be read' in p.stderr and 'Traceback' not in p.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_trains_on_a_gpu_in_bfloat16(data, tmp_path):
    from vae_nb.training.trainer import fit
    r = fit(dict(epochs=3, width=32, latent_dim=64, device='cuda', focal_gamma=0, class_weights='none'),
            tmp_path/'run', load_dataset(data), 'none')
    assert r['nonfinite'] == 0 and r['nelbo'] < 300


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize('kind', ['grids', 'bernoulli', 'hierarchical', 'logistic_mixture', 'categorical_256', 'gaussian',
                                  'continuous_bernoulli'])
def test_a_recorded_step_computes_what_the_usual_one_does(kind, data, tmp_path):
    "40 steps, every tenth of them on a shorter batch that is never recorded."
    from vae_nb.training.trainer import fit, load_data
    common = dict(epochs=4, width=16, depth=1, latent_dim=16, hidden=32, batch_size=50, device='cuda', precision='float32', clip_norm=50,
                  beta_warmup=2, lr_warmup=1)
    if kind == 'grids': c = common | dict(data_path=str(data), train_limit=480, augment='colours')
    else:
        c = common | dict(data='fashion_mnist', code='flat', train_limit=480, val_limit=100)
        c |= dict(binarise='dynamic') if kind in ('bernoulli', 'hierarchical') else dict(likelihood=kind)
        if kind == 'hierarchical': c |= dict(network='hierarchical', groups=3)
        try: load_data(TrainConfig(**c))
        except Exception: pytest.skip('Fashion-MNIST is not in the data folder')
    logs = {}
    for recorded in (True, False):
        fit(c | dict(cuda_graph=recorded), tmp_path/str(recorded), progress='none')
        logs[recorded] = read_events(tmp_path/str(recorded)/'events.jsonl', 'step')
    assert len(logs[True]) == len(logs[False]) == 40
    for a, b in zip(logs[True], logs[False]):
        for k in ('loss', 'nll', 'kl', 'grad_norm'): assert a[k] == pytest.approx(b[k], rel=2e-2, abs=1e-2), (kind, a['step'], k)
    assert logs[True][-1]['loss'] < logs[True][0]['loss']


def test_several_trainings_at_a_time_are_the_same_trainings(data, tmp_path):
    from vae_nb.training.trainer import fit, fit_all
    base = dict(data_path=str(data), epochs=1, width=8, depth=0, latent_dim=16, batch_size=64, lr=3e-3, device='cpu')
    jobs = {str(tmp_path/f'at once {s}'): base | dict(seed=s) for s in (0, 1)}
    done = fit_all(jobs, workers=2); alone = fit(base, tmp_path/'alone', progress='none')
    assert list(done) == list(jobs) and done[str(tmp_path/'at once 0')]['nelbo'] == pytest.approx(alone['nelbo'], rel=1e-3)
    when = lambda: (tmp_path/'at once 1'/'metrics.json').stat().st_mtime_ns
    stamp = when(); assert fit_all(jobs, workers=2) == done and when() == stamp       # found, not trained again
    wrong = {str(tmp_path/f'wrong {s}'): base | dict(seed=s, data_path=str(tmp_path/'none.npz')) for s in (0, 1)}
    with pytest.raises(RuntimeError, match='no data set at'): fit_all(wrong, workers=2)


def test_evaluation_is_decided_by_its_seed(data, tmp_path):
    "The same seed gives the same measures to the last bit, another one does not."
    subprocess.run(command(data, tmp_path/'run', '--epochs', '1'), env=ENV, check=True, capture_output=True)
    def measured(seed):
        argv = [sys.executable, '-m', 'vae_nb.evaluate', str(tmp_path/'run'), '--draws', '5', '--limit', '60', '--device', 'cpu',
                '--seed', str(seed)]
        p = subprocess.run(argv, env=ENV, capture_output=True, text=True); assert p.returncode == 0, p.stderr
        return read_json(tmp_path/'run'/'evaluation'/'metrics.json')['metrics']
    a, b, other = measured(3), measured(3), measured(4)
    assert a == b and a['nelbo'] != other['nelbo'] and a['nll'] != other['nll']
