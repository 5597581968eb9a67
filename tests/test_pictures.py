"Training on somebody's own pictures, from the command line: one command, killed and continued, evaluated, refused."
import os, signal, subprocess, sys, tarfile

import pytest, torch
from PIL import Image
from safetensors.torch import load_file

from test_training import latest, wait_for_step
from vae_nb.core import new_generator, read_json
from vae_nb.runs import read_events

ENV = os.environ | dict(OMP_NUM_THREADS='1')
SMALL = '--image-size 16 --epochs 3 --width 8 --depth 0 --latent-dim 8 --hidden 16 --device cpu --batch-size 20 --lr 0.003'.split()


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "A folder with 240 colour pictures of two kinds, in class folders, larger than asked for and not square."
    root, g = tmp_path_factory.mktemp('own')/'mine', new_generator(0, 'own')
    for kind in range(2):
        (root/f'kind {kind}').mkdir(parents=True)
        for i in range(120):
            a = torch.randint(50, (20, 26, 3), generator=g).byte(); r, c = torch.randint(2, 9, (2,), generator=g).tolist()
            a[r:r + 9, c:c + 9, kind] = 230; Image.fromarray(a.numpy()).save(root/f'kind {kind}'/f'{i:03}.png')
    return root


def train(path, out, *more):
    return [sys.executable, '-m', 'vae_nb.train', '--data', 'images', '--data-path', str(path), *SMALL, '--out', str(out), *more]


def test_one_command_trains_on_a_folder_and_another_says_what_came_out(pictures, tmp_path):
    p = subprocess.run(train(pictures, tmp_path/'run'), env=ENV, capture_output=True, text=True); assert p.returncode == 0, p.stderr
    assert 'nats a picture' in p.stdout and 'PSNR' in p.stdout
    audit = read_events(tmp_path/'run'/'events.jsonl', 'audit')[0]
    assert audit['shape'][1:] == [3, 16, 16] and abs(sum(audit['histogram']) - 1) < 1e-3
    p = subprocess.run([sys.executable, '-m', 'vae_nb.evaluate', str(tmp_path/'run'), '--draws', '5', '--samples', '0', '--split', 'train',
                        '--device', 'cpu'], env=ENV, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    m = read_json(tmp_path/'run'/'evaluation'/'metrics.json')['metrics']
    assert 0 < m['bits_per_dim'] < 8 and abs(m['nelbo'] - m['nll'] - m['kl']) < 1e-6 and 'iwae_5' in m
    made = {f.stem for f in (tmp_path/'run'/'evaluation'/'figures').iterdir()}
    assert made >= {'reconstructions', 'samples', 'interpolations', 'traversals', 'neighbours', 'failures', 'curves', 'rates'}


def test_a_tar_of_the_same_pictures_gives_the_same_weights(pictures, tmp_path):
    with tarfile.open(tmp_path/'mine.tar', 'w') as t: t.add(pictures, 'mine')
    for name, path in dict(folder=pictures, tar=tmp_path/'mine.tar').items():
        p = subprocess.run(train(path, tmp_path/name, '--epochs', '1'), env=ENV, capture_output=True, text=True)
        assert p.returncode == 0, p.stderr
    a, b = (load_file(tmp_path/n/'checkpoint'/'best.safetensors') for n in ('folder', 'tar'))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('extra', [
    ['--binarise', 'dynamic', '--augment', 'flip'],                                       # pixels and flips are drawn at every step
    ['--likelihood', 'gaussian', '--sigma', 'optimal', '--network', 'hierarchical', '--latent-channels', '1']],
    ids=['binary', 'hierarchical'])
def test_killed_and_continued_gives_the_same_weights(pictures, tmp_path, extra):
    whole = train(pictures, tmp_path/'whole', '--checkpoint-minutes', '5', *extra)
    killed = train(pictures, tmp_path/'killed', '--checkpoint-minutes', '0', *extra)
    subprocess.run(whole, env=ENV, check=True, capture_output=True)
    p = subprocess.Popen(killed, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path/'killed', 9, p); p.send_signal(signal.SIGKILL); p.wait(); p.stderr.close()
    subprocess.run(killed, env=ENV, check=True, capture_output=True)
    a, b = latest(tmp_path/'whole'), latest(tmp_path/'killed')
    for part in a: assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])


@pytest.mark.parametrize('extra, said', [
    (['--likelihood', 'bernoulli'], 'binarise dynamic'), (['--likelihood', 'categorical'], 'categorical_256'),
    (['--focal-gamma', '2'], 'leave them off for images'), (['--augment', 'rotate'], 'images know none and flip'),
    (['--image-size', '30'], '30'), (['--likelihood', 'gausian'], 'gausian'), (['--code', 'map', '--latent-dim', '9'], 'multiple of')])
def test_what_does_not_fit_is_one_sentence(pictures, tmp_path, extra, said):
    p = subprocess.run(train(pictures, tmp_path/'run', *extra), env=ENV, capture_output=True, text=True)
    assert p.returncode == 2 and said in p.stderr and 'Traceback' not in p.stderr, p.stderr
    assert not (tmp_path/'run'/'config.json').exists()


def test_a_folder_that_is_not_there(tmp_path):
    p = subprocess.run(train(tmp_path/'nowhere', tmp_path/'run'), env=ENV, capture_output=True, text=True)
    assert p.returncode == 2 and 'There are no pictures at' in p.stderr and 'Traceback' not in p.stderr
