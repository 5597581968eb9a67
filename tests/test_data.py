"The data floor, where a notebook cannot show it: damaged files, crashes, the facts of the 100,000-grid data set, other processes."
import hashlib, io, json, os, subprocess, sys, zipfile
from pathlib import Path

import numpy as np, pytest, torch

from vae_nb.core import UserError, new_generator
from vae_nb.data.composition import FAMILIES, RECIPES, AtomicImageGenerator
from vae_nb.data.datasets import (AUGMENTATIONS, SPLITS, augment_grids, deflate_nats, entropy_of_mix, file_sizes, load_dataset,
                                  make_dataset, save_dataset, source_entropy)
from vae_nb.data.grids import crop, grid_stats
from vae_nb.data.shapes import PATTERNS, LineGenerator, PatternGenerator, RectangleGenerator
from vae_nb.generate import generate


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The data set of the brief, generated once: its summary and its contents as read back."
    out = tmp_path_factory.mktemp('data')/'simplified_dataset_100k.npz'
    return generate(out, samples=100_000, seed=0, recipe='simplified'), load_dataset(out)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A good small file."
    return save_dataset(tmp_path_factory.mktemp('small')/'small.npz', make_dataset(samples=100))


# The 100,000 grids

def test_counts_shape_and_type(made):
    _, ds = made
    assert ds.sizes == dict(train=80_000, val=10_000, test=10_000)
    for k in SPLITS:
        x = getattr(ds, k)
        assert x.dtype == torch.uint8 and x.shape[1:] == (16, 16)
        assert x.unique().tolist() == list(range(10)), "all ten colours, and no other symbol, in each part"


def test_keys_are_as_promised(made):
    with np.load(made[0]['out'], allow_pickle=False) as z:
        assert {'train', 'val', 'test', 'meta'} <= set(z.files)
        meta = json.loads(str(z['meta']))
    assert meta['recipe']['name'] == 'simplified' and meta['seed'] == 0 and meta['samples'] == 100_000


def test_no_blobs_and_every_pattern(made):
    "By metadata: only the seven families, and each of the five patterns really occurs in each part."
    _, ds = made
    for k in SPLITS:
        codes = ds.objects[k]['type']
        assert {FAMILIES[c] for c in codes.unique().tolist() if c != 255} == {'rectangle', 'line', *PATTERNS}
    counts = torch.bincount(ds.objects['train']['type'].flatten().long(), minlength=256)[:len(FAMILIES)]
    share = counts/counts.sum()
    assert share[FAMILIES.index('blob')] == 0
    for f in PATTERNS: assert abs(share[FAMILIES.index(f)] - 1/15) < .005


def test_shapes_on_the_grids_are_the_listed_ones(made):
    "Without the metadata: every isolated one-colour region of a single-object grid is one of the 55 shapes."
    _, ds = made
    legal = {s.key for g in (RectangleGenerator(), LineGenerator(), PatternGenerator()) for s in g.shapes()}
    assert len(legal) == 55
    single = ds.val[ds.objects['val']['n_objects'] == 1]
    assert len(single) > 1000
    for g in single.numpy():
        mask = g > 0; r, c = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        m = np.ascontiguousarray(mask[r[0]:r[-1]+1, c[0]:c[-1]+1])
        assert (*m.shape, m.tobytes()) in legal and len(np.unique(g)) == 2


def test_number_of_objects(made):
    n = torch.cat([made[1].objects[k]['n_objects'] for k in SPLITS])
    share = torch.bincount(n.long(), minlength=7)/len(n)
    assert share[0] == 0 and len(share) == 7
    assert (share[2:] - 1/6).abs().max() < .006
    assert .150 < share[1] < 1/6, "grids with one object repeat most often, so they lose most"


def test_black_share(made):
    black = torch.cat([getattr(made[1], k) for k in SPLITS]).eq(0).float().mean()
    assert abs(float(black) - .9177) < .001


def test_no_grid_twice_in_any_part(made):
    keys = [g.tobytes() for k in SPLITS for g in getattr(made[1], k).numpy()]
    assert len(keys) == len(set(keys)) == 100_000
    assert 1400 < made[0]['duplicates_removed'] < 2000


def test_size_raw(made):
    "The brief's 'about 25 MB, within 5': the grids in memory, 100,000 times 256 bytes."
    assert made[0]['raw_bytes'] == made[1].raw_bytes == 25_600_000


def test_size_compressed(made):
    "The brief's 'compressed to 1.6 MB': what the three grid arrays take in the file. The file holds the objects' metadata besides."
    s = file_sizes(made[0]['out'])
    assert 1.5e6 < s['grids'] < 1.9e6
    assert s['grids'] < s['file'] < 4e6 and s['metadata'] > .5e6
    assert abs(deflate_nats(made[1].train)/np.log(2) - 134) < 4   # bits a grid


def test_boxes_hold_their_objects(made):
    _, ds = made
    x, o = ds.test, ds.objects['test']
    i, j = torch.arange(16)[:, None], torch.arange(16)[None]
    covered = torch.zeros_like(x, dtype=torch.bool)
    for k in range(6):
        t, l, h, w = (o['box'][:, k, b].int()[:, None, None] for b in range(4))
        there = (o['type'][:, k] != 255)[:, None, None]
        covered |= there & (i >= t) & (i < t+h) & (j >= l) & (j < l+w) & (x == o['colour'][:, k][:, None, None])
    assert torch.equal(covered, x > 0)


# One seed, one result

def _digests():
    "What seed 7 gives for every recipe."
    parts = {r: make_dataset(r, 300, seed=7) for r in sorted(RECIPES)}
    return {r: hashlib.sha256(d.train.numpy().tobytes() + d.test.numpy().tobytes()).hexdigest() for r, d in parts.items()}


def test_same_in_another_process():
    folder = str(Path(__file__).parent)
    code = f"import sys, json; sys.path.insert(0, {folder!r}); import test_data; print(json.dumps(test_data._digests()))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == _digests()


def test_threads_do_not_change_the_result():
    threads = torch.get_num_threads(); draws = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            draws.append(AtomicImageGenerator('arc_like').sample(3000, new_generator(0, 'threads')).grids)
    finally: torch.set_num_threads(threads)
    assert torch.equal(*draws)


def test_global_random_state_is_neither_used_nor_moved():
    import random
    first = make_dataset('atomic', 200).train
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    assert torch.equal(make_dataset('atomic', 200).train, first)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_neighbouring_seeds_share_no_more_than_chance():
    a, b = ({g.tobytes() for g in make_dataset(samples=5000, seed=s).train.numpy()} for s in (0, 1))
    assert len(a & b) < 40   # single-object grids collide by chance


# Other sizes

@pytest.mark.parametrize('size', [4, 7, 10, 20, 32])
def test_other_canvases(size):
    r = RECIPES['simplified'].model_copy(update=dict(size=size, max_objects=2, rectangle_sides=(1, 3), line_lengths=(2, 4)))
    b = AtomicImageGenerator(r).sample(500, new_generator(0, size))
    assert b.grids.shape == (500, size, size) and (b.n_objects >= 1).all() and (b.n_objects <= 2).all()
    assert (b.grids > 0).flatten(1).any(1).all()


def test_entropy_falls_with_the_choices():
    "Fewer colours, fewer nats: each object loses ln 9 - ln 3, since colour is chosen independently of all else."
    three = RECIPES['simplified'].model_copy(update=dict(colours=(1., 1., 1.) + (0.,)*6))
    full, less = source_entropy('simplified', 1200), source_entropy(three, 1200)
    assert abs((full.nats - less.nats) - 3.5*np.log(3)) < 5*(full.stderr + less.stderr)


def test_the_floor_of_the_stored_set_is_higher(made):
    "Without repeats there are fewer grids of one object, and these are the cheapest."
    source = source_entropy(samples=1200)
    stored = entropy_of_mix(source, torch.cat([made[1].objects[k]['n_objects'] for k in SPLITS]))
    fresh = entropy_of_mix(source, AtomicImageGenerator('simplified').sample(100_000, new_generator(0, 'mix')).n_objects)
    assert .2 < stored.nats - source.nats < .6 and stored.stderr == pytest.approx(source.stderr, rel=.1)
    assert abs(fresh.nats - source.nats) < 5*16.2/np.sqrt(100_000)   # 16.2: how far the six figures spread
    with pytest.raises(UserError, match="with 7 objects"): entropy_of_mix(source, [3, 7])


def test_every_augmentation_by_its_name(made):
    x = made[1].val[:500]
    for k in AUGMENTATIONS: assert not torch.equal(augment_grids(x, new_generator(0, k), (k,)), x)


# What the statistics call a line, a frame and containment, the slow way

def _slow(g):
    "Line, frame and containment of one grid by plain loops."
    H, W = g.shape
    line = min(H, W) >= 3 and any(r[0] > 0 and (r == r[0]).all() for r in (*g, *g.T))
    left, frame, contained = {(i, j) for i in range(H) for j in range(W) if g[i, j]}, False, False
    while left:
        todo = [min(left)]; part = set(todo); c = g[todo[0]]
        while todo:
            i, j = todo.pop()
            new = {(a, b) for a in (i-1, i, i+1) for b in (j-1, j, j+1) if (a, b) in left - part and g[a, b] == c}
            part |= new; todo += new
        left -= part
        (t, b), (l, r) = ((min(v), max(v)) for v in zip(*part))
        frame |= b-t >= 2 and r-l >= 2 and _ring(t, b, l, r) <= part and not _ring(t+1, b-1, l+1, r-1) & part
        contained |= any(_walled(g, part, wall) for wall in range(1, 10) if wall != c)
    return line, frame, contained


def _ring(t, b, l, r): return {(i, j) for i in range(t, b+1) for j in range(l, r+1) if i in (t, b) or j in (l, r)}


def _walled(g, part, wall):
    "No way leads from any cell of `part` off the grid without crossing the colour `wall`."
    seen, todo = set(part), list(part)
    while todo:
        i, j = todo.pop()
        for a, b in ((i-1, j), (i+1, j), (i, j-1), (i, j+1)):
            if not (0 <= a < g.shape[0] and 0 <= b < g.shape[1]): return False
            if g[a, b] != wall and (a, b) not in seen: seen.add((a, b)); todo.append((a, b))
    return True


def test_lines_frames_and_containment_by_loops():
    grids = [crop(g) for g in AtomicImageGenerator('arc_like').sample(400, new_generator(0, 'loops')).grids]
    rng = np.random.default_rng(0)
    for p in ((.3, .6, .1), (.1, .8, .1)): grids += [rng.choice(3, size=rng.integers(1, 8, 2), p=p).astype(np.uint8) for _ in range(300)]
    fast, slow = grid_stats(grids)[['full_line', 'frame', 'containment']].to_numpy(), np.array([_slow(g) for g in grids])
    assert (slow.sum(0) > 20).all() and (fast == slow).all()


# Files that are damaged, foreign or hostile

def _with(path, out, **fields):
    arrays = {**dict(np.load(path)), **fields}
    np.savez(out, **{k: v for k, v in arrays.items() if v is not None})
    return out


def refused(path, *parts):
    with pytest.raises(UserError) as e: load_dataset(path)
    for p in (str(path), *parts): assert p in str(e.value), str(e.value)
    assert '\n' not in str(e.value)


def test_truncated_at_any_point(small, tmp_path):
    whole = small.read_bytes(); bad = tmp_path/'cut.npz'
    for n in (0, 1, 30, 500, len(whole)//2, len(whole)-30, len(whole)-1):
        bad.write_bytes(whole[:n]); refused(bad)


def test_flipped_bytes_never_load_silently(small, tmp_path):
    "A damaged byte in the compressed grids is caught by the checksum, and named."
    bad = tmp_path/'flipped.npz'; data = bytearray(small.read_bytes())
    with zipfile.ZipFile(small) as z: start = z.getinfo('train.npy').header_offset
    for at in (200, 400, 700):
        flipped = bytearray(data); flipped[start+at] ^= 0xff; bad.write_bytes(flipped); refused(bad, "'train'")


def test_not_an_npz(tmp_path):
    for name, content in {'text.npz': b'hello', 'empty.npz': b'', 'pickle.npz': b'\x80\x04\x95\x00.'}.items():
        (tmp_path/name).write_bytes(content); refused(tmp_path/name, 'not an .npz')
    one = tmp_path/'one.npz'
    with open(one, 'wb') as f: np.save(f, np.zeros(3))
    refused(one, 'not an .npz')
    refused(tmp_path, 'no data file')
    refused(tmp_path/'missing.npz', 'no data file')


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path/'x.npz', 'w') as z: z.writestr('readme.txt', 'hello')
    refused(tmp_path/'x.npz', "'train'")
    with zipfile.ZipFile(tmp_path/'y.npz', 'w') as z: z.writestr('train.npy', b'hello')
    refused(tmp_path/'y.npz', "'train'")


class Bomb:
    def __reduce__(self): return (open, ('/tmp/vae_nb_must_not_exist', 'w'))


def test_a_pickle_is_never_opened(small, tmp_path):
    buffer = io.BytesIO(); np.save(buffer, np.array([Bomb()], object), allow_pickle=True)
    refused(_with(small, tmp_path/'o.npz', val=np.array([[1], [1, 2]], object)), "'val'", 'pickle')
    with zipfile.ZipFile(tmp_path/'bomb.npz', 'w') as z: z.writestr('train.npy', buffer.getvalue())
    refused(tmp_path/'bomb.npz', "'train'", 'pickle')
    assert not os.path.exists('/tmp/vae_nb_must_not_exist')


@pytest.mark.parametrize('key', SPLITS)
def test_each_part_is_checked(small, tmp_path, key):
    x, bad = np.load(small)[key], tmp_path/'bad.npz'
    refused(_with(small, bad, **{key: None}), repr(key), 'lacks')
    refused(_with(small, bad, **{key: x.astype(np.int64)}), repr(key), 'int64')
    refused(_with(small, bad, **{key: x.astype(bool)}), repr(key), 'bool')
    refused(_with(small, bad, **{key: x[:, :, :, None]}), repr(key), 'shape')
    refused(_with(small, bad, **{key: x[:0]}), repr(key), 'shape')
    refused(_with(small, bad, **{key: np.full_like(x, 11)}), repr(key), 'value 11')


def test_padding_is_allowed_only_where_declared(tmp_path):
    ds = make_dataset('arc_like', 50); path = save_dataset(tmp_path/'padded.npz', ds)
    assert load_dataset(path).n_symbols == 11 and (load_dataset(path).train == 10).any()
    refused(_with(path, tmp_path/'undeclared.npz', meta=np.array('{}')), 'value 10')
    refused(_with(path, tmp_path/'odd.npz', meta=np.array('{"n_symbols": 200}')), "'meta'")


# A crash while saving

def test_crash_while_writing_keeps_the_old_file(tmp_path):
    path = save_dataset(tmp_path/'grids.npz', make_dataset(samples=20)); before = path.read_bytes()
    code = f"""
import os, numpy as np
from vae_nb.data import datasets
real = np.savez_compressed
def dies(f, **arrays): real(f, **arrays); f.flush(); os._exit(9)      # the power goes when all but the rename is done
datasets.np.savez_compressed = dies
datasets.save_dataset({str(path)!r}, datasets.make_dataset(samples=40))
"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == 9
    assert path.read_bytes() == before and load_dataset(path).sizes['train'] == 16


def test_error_while_writing_leaves_no_litter(tmp_path, monkeypatch):
    from vae_nb.data import datasets
    path = save_dataset(tmp_path/'grids.npz', make_dataset(samples=20)); before = path.read_bytes()
    def full(f, **arrays): f.write(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(datasets.np, 'savez_compressed', full)
    with pytest.raises(OSError): save_dataset(path, make_dataset(samples=40))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['grids.npz']


def test_unwritable_path_is_found_before_the_work(tmp_path, monkeypatch):
    import vae_nb.generate as g
    def never(*a, **k): raise AssertionError("drew before it looked")
    monkeypatch.setattr(g, 'make_dataset', never)
    (tmp_path/'file').write_text('x')
    for out in (tmp_path/'file'/'x.npz', tmp_path, tmp_path/'x.csv', '/proc/x.npz'):
        with pytest.raises(UserError): generate(out, samples=100)
    assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_missing_folders_are_made(tmp_path):
    assert generate(tmp_path/'a'/'b'/'x.npz', samples=20)['samples'] == 20
    assert load_dataset(tmp_path/'a'/'b'/'x.npz').sizes == dict(train=16, val=2, test=2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize('recipe', list(RECIPES))
def test_gpu_repeats_itself_and_agrees_in_distribution(recipe):
    gpu, cpu = AtomicImageGenerator(recipe, 'cuda'), AtomicImageGenerator(recipe)
    a, b = (gpu.sample(50_000, new_generator(0, 'gpu', device='cuda')).grids for _ in range(2))
    assert torch.equal(a, b)
    share = lambda x: (x == 0).float().mean().item()
    assert abs(share(a) - share(cpu.sample(50_000, new_generator(0, 'cpu')).grids)) < .01
