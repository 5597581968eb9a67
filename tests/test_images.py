"Images from files: published layouts made small, folders and tars of people's own, and every way in which they can be broken."
import io, os, pickle, shutil, socket, tarfile, urllib.error, urllib.request
from hashlib import md5
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from vae_nb.core import UserError, load_settings, new_generator
from vae_nb.data.images import (BINARISE, IMAGE_SETS, SPLITS, binarise_images, draw_binary, flip_images, image_grid, load_images,
                                show_images)

DATA = load_settings().data


def refused(*parts, name='images', path=None, **kw):
    "Loading fails with one sentence that has all `parts`."
    with pytest.raises(UserError) as e: load_images(name, path, **kw)
    for p in parts: assert str(p) in str(e.value), str(e.value)
    assert '\n' not in str(e.value)
    return str(e.value)


def pixels(n, side=32, channels=3, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, side, side, channels), np.uint8)


def write_folder(path, n=30, side=32, channels=3, classes=('cat', 'dog', 'owl'), ending='png', seed=0):
    "`n` random pictures in class folders below `path`; returns the pixels in the order of the names."
    x = pixels(n, side, channels, seed)
    for k, a in enumerate(x):
        p = path.joinpath(*([classes[k*len(classes)//n]] if classes else []), f'{k:04}.{ending}')
        p.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(a.squeeze()).save(p)
    return x


def write_tar(path, folder, arcname='', mode='w'):
    with tarfile.open(path, mode) as t:
        for f in sorted(folder.rglob('*')):
            if f.is_file(): t.add(f, arcname=os.path.join(arcname, f.relative_to(folder)))
    return path


def everything(ds): return {a.tobytes() for k in SPLITS for a in getattr(ds, k).numpy()}


def same(a, b): return all(torch.equal(getattr(a, k), getattr(b, k)) for k in SPLITS)


# Folders and tars

@pytest.mark.parametrize('n', [10, 11, 30, 101])
def test_a_folder_is_split_80_10_10_and_each_picture_is_there_once(tmp_path, n):
    x = write_folder(tmp_path/'p', n); ds = load_images('images', tmp_path/'p')
    assert ds.sizes == dict(train=n - 2*(n//10), val=n//10, test=n//10)
    assert everything(ds) == {a.transpose(2, 0, 1).tobytes() for a in x} and sum(ds.sizes.values()) == n
    assert all(getattr(ds, k).dtype == torch.uint8 for k in SPLITS)


def test_labels_belong_to_their_pictures(tmp_path):
    x = write_folder(tmp_path/'p', 30); ds = load_images('images', tmp_path/'p'); assert ds.classes == ['cat', 'dog', 'owl']
    true = {a.transpose(2, 0, 1).tobytes(): k*3//30 for k, a in enumerate(x)}
    for k in SPLITS:
        assert ds.labels[k].dtype == torch.int64
        assert [true[a.tobytes()] for a in getattr(ds, k).numpy()] == ds.labels[k].tolist()


def test_pictures_without_class_folders_have_no_labels(tmp_path):
    write_folder(tmp_path/'flat', 20, classes=()); flat = load_images('images', tmp_path/'flat')
    assert flat.labels == {} and flat.classes == []
    write_folder(tmp_path/'one', 20, classes=('cat',)); assert load_images('images', tmp_path/'one').labels == {}
    write_folder(tmp_path/'mixed', 20); shutil.copy(tmp_path/'flat'/'0000.png', tmp_path/'mixed')
    assert load_images('images', tmp_path/'mixed').labels == {}


@pytest.mark.parametrize('mode, ending', [('w', 'tar'), ('w:gz', 'tar.gz'), ('w:gz', 'tgz')])
@pytest.mark.parametrize('arcname', ['', 'deep/inside', '../../elsewhere', '/absolute'])
def test_a_tar_is_the_same_set_as_its_folder_wherever_its_names_point(tmp_path, mode, ending, arcname):
    write_folder(tmp_path/'p', 20); tar = tmp_path/f'p.{ending}'
    with tarfile.open(tar, mode) as t:
        for f in sorted((tmp_path/'p').rglob('*.png'), reverse=True):      # not in the order of the names
            m = t.gettarinfo(f); m.name = f'{arcname}/{f.relative_to(tmp_path/"p")}' if arcname else str(f.relative_to(tmp_path/'p'))
            with open(f, 'rb') as o: t.addfile(m, o)
    before = sorted(tmp_path.rglob('*')), sorted(tmp_path.parent.glob('*'))
    a, b = load_images('images', tmp_path/'p'), load_images('images', tar)
    assert same(a, b) and a.meta['split_hash'] == b.meta['split_hash'] and a.classes == b.classes
    assert all(torch.equal(a.labels[k], b.labels[k]) for k in SPLITS)
    assert (sorted(tmp_path.rglob('*')), sorted(tmp_path.parent.glob('*'))) == before, "nothing is unpacked"


def test_links_in_a_tar_are_followed_inside_it_only(tmp_path):
    write_folder(tmp_path/'p', 12, classes=()); tar = write_tar(tmp_path/'p.tar', tmp_path/'p')
    with tarfile.open(tar, 'a') as t:
        m = tarfile.TarInfo('hard.png'); m.type, m.linkname = tarfile.LNKTYPE, '0003.png'; t.addfile(m)
    assert sum(load_images('images', tar).sizes.values()) == 13
    Image.fromarray(pixels(1)[0]).save(tmp_path/'secret.png')
    with tarfile.open(tar, 'a') as t:
        m = tarfile.TarInfo('soft.png'); m.type, m.linkname = tarfile.SYMTYPE, str(tmp_path/'secret.png'); t.addfile(m)
    refused(tar, 'leads nowhere', path=tar)


@pytest.mark.parametrize('layout', ['folders', 'tars', 'tar and folder', 'one tar', 'tars of train/ and test/', 'below'])
def test_train_and_test_keep_their_split(tmp_path, layout):
    p = tmp_path/'set'; train, test = write_folder(p/'train', 30, seed=1), write_folder(p/'test', 12, seed=2); where = p
    if layout == 'one tar': where = write_tar(tmp_path/'set.tar', p, 'set')
    if layout == 'below': where = tmp_path
    for k in dict(tars=('train', 'test')).get(layout, ('test',) if layout == 'tar and folder' else ()):
        write_tar(p/f'{k}.tar', p/k); shutil.rmtree(p/k)
    if layout.endswith('test/'):
        for k in ('train', 'test'): write_tar(p/f'{k}.tar', p/k, k); shutil.rmtree(p/k)
    ds = load_images('images', where)
    assert ds.sizes == dict(train=27, val=3, test=12) and ds.classes == ['cat', 'dog', 'owl'] and ds.meta['test'] == "the set's own"
    assert {a.tobytes() for a in ds.test.numpy()} == {a.transpose(2, 0, 1).tobytes() for a in test}
    assert {a.tobytes() for k in ('train', 'val') for a in getattr(ds, k).numpy()} == {a.transpose(2, 0, 1).tobytes() for a in train}


def test_pictures_beside_train_and_test_are_not_dropped_silently(tmp_path):
    for k in ('train', 'test', 'val'): write_folder(tmp_path/k, 12)
    refused(tmp_path, 'also val/cat/0000.png', path=tmp_path)


def test_the_split_has_its_own_seed_and_its_hash_tells(tmp_path):
    write_folder(tmp_path, 40); a = load_images('images', tmp_path)
    torch.manual_seed(5); np.random.seed(5); state = torch.get_rng_state(), np.random.get_state()[1].copy()
    b = load_images('images', tmp_path); assert same(a, b) and a.meta == b.meta
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    c = load_images('images', tmp_path, split_seed=1)
    assert not same(a, c) and a.meta['split_hash'] != c.meta['split_hash'] and everything(a) == everything(c)
    (tmp_path/'cat'/'0000.png').rename(tmp_path/'cat'/'renamed.png')
    assert load_images('images', tmp_path).meta['split_hash'] != a.meta['split_hash']


def test_val_size_and_limit(tmp_path):
    write_folder(tmp_path, 40); whole = load_images('images', tmp_path, val_size=10)
    assert whole.sizes == dict(train=26, val=10, test=4)
    few = load_images('images', tmp_path, val_size=10, limit=3)
    assert few.sizes == dict(train=3, val=3, test=3) and all(torch.equal(getattr(few, k), getattr(whole, k)[:3]) for k in SPLITS)
    assert few.meta['limit'] == 3 and few.meta['split_hash'] != whole.meta['split_hash']
    refused('val_size 36', path=tmp_path, val_size=36)
    for bad in (0, -1, 1.5, True): refused(f'val_size {bad!r}', path=tmp_path, val_size=bad)
    for bad in (-1, 2.0, True): refused(f'limit {bad!r}', path=tmp_path, limit=bad)
    for bad in (-1, 'x', True): refused('seed', path=tmp_path, split_seed=bad)


# What becomes of a picture

@pytest.mark.parametrize('ending', ['png', 'bmp', 'jpg', 'jpeg', 'webp', 'PNG', 'JPG'])
def test_every_kind_of_file(tmp_path, ending):
    write_folder(tmp_path, 12, channels=1, ending=ending); ds = load_images('images', tmp_path)
    assert ds.channels == (3 if ending == 'webp' else 1) and ds.size == 32    # WebP knows no grey
    assert sum(ds.sizes.values()) == 12


def test_one_colour_picture_makes_all_rgb(tmp_path):
    write_folder(tmp_path, 12, channels=1, classes=()); assert load_images('images', tmp_path).channels == 1
    Image.fromarray(pixels(1)[0]).save(tmp_path/'colour.png')
    ds = load_images('images', tmp_path); assert ds.channels == 3 == ds.meta['channels']
    assert sum(bool((a[0] == a[1]).all()) for k in SPLITS for a in getattr(ds, k)) == 12


@pytest.mark.parametrize('size', [16, 28, 32, 64])
@pytest.mark.parametrize('shape', [(40, 100), (100, 40), (32, 32), (10, 12)])
def test_resizing_keeps_the_middle_square(tmp_path, size, shape):
    "A green square with a blue corner, between red borders: the borders go, and left, right, up and down stay."
    h, w = shape; s = min(h, w); a = np.zeros((h, w, 3), np.uint8); a[..., 0] = 255
    t, l = (h-s)//2, (w-s)//2; a[t:t+s, l:l+s] = 0, 255, 0; a[t:t+s//2, l:l+s//2] = 0, 0, 255
    for k in range(10): Image.fromarray(a).save(tmp_path/f'{k}.png')
    x = load_images('images', tmp_path, size=size).train[0].int(); assert x.shape == (3, size, size)
    assert x[0].max() == 0 and (x[:, :size//4, :size//4].flatten(1).T == torch.tensor([0, 0, 255])).all()
    assert (x[:, -size//4:].flatten(1).T == torch.tensor([0, 255, 0])).all()


def test_reducing_is_antialiased(tmp_path):
    a = np.indices((128, 128)).sum(0) % 2*255
    for k in range(10): Image.fromarray(a.astype(np.uint8)).save(tmp_path/f'{k}.png')
    x = load_images('images', tmp_path).train.float(); assert (x - 127.5).abs().max() < 2


def test_big_jpegs_come_out_as_the_slow_way(tmp_path):
    ij = np.mgrid[:700, :900]; a = np.stack([ij[0]/700*255, ij[1]/900*255, 128 + 100*np.sin(ij.sum(0)/90)], -1).astype(np.uint8)
    for k in range(10): Image.fromarray(a).save(tmp_path/f'{k}.jpg', quality=95)
    x = load_images('images', tmp_path).train[0].permute(1, 2, 0).numpy().astype(int)
    slow = np.asarray(Image.fromarray(a[:, 100:800]).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert abs(x - slow).mean() < 2 and abs(x - slow).max() < 16


# What is broken

@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp', 'bmp'])
@pytest.mark.parametrize('as_tar', [False, True])
def test_a_truncated_picture_is_named_and_the_load_fails(tmp_path, ending, as_tar):
    write_folder(tmp_path/'p', 12, ending=ending); bad = tmp_path/'p'/'dog'/f'0005.{ending}'; whole = bad.read_bytes()
    for n in (0, 3, len(whole)//2, len(whole)*9//10):
        bad.write_bytes(whole[:n])
        path = write_tar(tmp_path/'p.tar', tmp_path/'p') if as_tar else tmp_path/'p'
        refused(path, f'0005.{ending}', 'cannot be read', path=path)


def test_a_flipped_byte_in_a_png_is_found(tmp_path):
    write_folder(tmp_path, 12); bad = tmp_path/'dog'/'0005.png'; whole = bad.read_bytes()
    for at in (60, len(whole)//2, len(whole)-20):
        data = bytearray(whole); data[at] ^= 0xff; bad.write_bytes(data); refused(bad, path=tmp_path)


@pytest.mark.parametrize('content', [b'', b'hello', b'<html>404</html>', b'\x89PNG\r\n\x1a\n' + bytes(50), b'\xff\xd8\xff\xe0' + bytes(50)])
def test_what_is_no_picture_is_named(tmp_path, content):
    write_folder(tmp_path, 12); (tmp_path/'cat'/'no.png').write_bytes(content); refused(tmp_path/'cat'/'no.png', path=tmp_path)


def test_an_unreadable_picture_is_named(tmp_path):
    write_folder(tmp_path, 12); (tmp_path/'cat'/'gone.png').symlink_to(tmp_path/'nowhere.png')
    refused(tmp_path/'cat'/'gone.png', 'No such file', path=tmp_path)


def denied(monkeypatch, path):
    "Opening `path` is refused as to a user without permission (the tests may run as root, who is never refused)."
    import builtins
    real = {k: getattr(*k) for k in ((builtins, 'open'), (io, 'open'))}
    def guarded(f, *a, **k):
        if not isinstance(f, int) and os.fspath(f) == str(path): raise PermissionError(13, 'Permission denied', str(path))
        return real[io, 'open'](f, *a, **k)
    for where, what in real: monkeypatch.setattr(where, what, guarded)
    monkeypatch.setattr(tarfile, 'bltn_open', guarded)


def test_permission_denied(tmp_path, monkeypatch):
    write_folder(tmp_path/'p', 12); tar = write_tar(tmp_path/'p.tar', tmp_path/'p'); one = tmp_path/'p'/'cat'/'0001.png'
    with monkeypatch.context() as m: denied(m, one); refused(one, 'Permission denied', path=tmp_path/'p')
    with monkeypatch.context() as m: denied(m, tar); refused(tar, 'Permission denied', path=tar)


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, 12); real = os.scandir
    def guarded(path='.'):
        if os.fspath(path) == str(tmp_path/'cat'): raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    with monkeypatch.context() as m: m.setattr(os, 'scandir', guarded); refused(tmp_path/'cat', 'Permission denied', path=tmp_path)


def test_no_pictures_or_too_few(tmp_path):
    (tmp_path/'empty').mkdir(); refused(tmp_path/'empty', 'no pictures', path=tmp_path/'empty')
    (tmp_path/'empty'/'notes.txt').write_text('x'); (tmp_path/'empty'/'.hidden.png').write_text('x')
    refused(tmp_path/'empty', 'no pictures', path=tmp_path/'empty')
    tar = write_tar(tmp_path/'empty.tar', tmp_path/'empty'); refused(tar, 'no pictures', path=tar)
    write_folder(tmp_path/'few', 9); refused(tmp_path/'few', 'only 9 pictures', path=tmp_path/'few')
    refused('nothing at', tmp_path/'none', path=tmp_path/'none')
    refused('neither a folder nor a .tar', path=tmp_path/'empty'/'notes.txt')
    write_folder(tmp_path/'odd'/'train', 1); write_folder(tmp_path/'odd'/'test', 20); refused('only 21 pictures', path=tmp_path/'odd')


@pytest.mark.parametrize('mode, ending', [('w', 'tar'), ('w:gz', 'tgz')])
def test_a_tar_cut_short_anywhere(tmp_path, mode, ending):
    write_folder(tmp_path/'p', 20); whole = write_tar(tmp_path/f'p.{ending}', tmp_path/'p', mode=mode).read_bytes()
    bad = tmp_path/f'b.{ending}'
    with tarfile.open(tmp_path/f'p.{ending}') as t: ends = [m.offset for m in t][1:]; last = t.offset
    cuts = (0, 100, 512, 700, *ends[3:6], ends[-1], last, last+100) if mode == 'w' else (0, 5, 40, len(whole)//2, len(whole)-9)
    for n in cuts: bad.write_bytes(whole[:n]); refused(bad, 'cut short', path=bad)
    bad.write_bytes(b'not a tar at all'*100); refused(bad, 'damaged', path=bad)


def test_a_link_that_leads_back_does_not_loop(tmp_path):
    write_folder(tmp_path, 12); (tmp_path/'cat'/'again').symlink_to(tmp_path)
    assert sum(load_images('images', tmp_path).sizes.values()) == 12


def test_what_is_asked_for_is_checked_first(tmp_path):
    for bad in (8, 33, 224, -1, 28.5, '32'): refused(f'size {bad!r}', '16, 28, 32, 64', path=tmp_path, size=bad)
    refused("Did you mean 'cifar10'", name='cifar')
    refused('needs a path')
    refused('has its own', name='celeba64', val_size=5)


# Published sets, made small

def write_idx(path, a):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.array([0x800 + a.ndim, *a.shape], '>i4').tobytes() + a.astype(np.uint8).tobytes())


def write_fashion(root, n=60, m=20):
    raw = root/'FashionMNIST'/'raw'; train, test = (pixels(k, 28, 1, seed=k)[..., 0] for k in (n, m))
    for part, x in dict(train=train, t10k=test).items():
        write_idx(raw/f'{part}-images-idx3-ubyte', x); write_idx(raw/f'{part}-labels-idx1-ubyte', np.arange(len(x)) % 10)
    return raw, train, test


def test_small_fashion_mnist(tmp_path):
    raw, train, test = write_fashion(tmp_path); ds = load_images('fashion_mnist', tmp_path, val_size=10)
    assert ds.sizes == dict(train=50, val=10, test=20) and (ds.size, ds.channels, len(ds.classes)) == (28, 1, 10)
    assert (ds.test[:, 0].numpy() == test).all() and ds.labels['test'].tolist() == [k % 10 for k in range(20)]
    true = {a.tobytes(): k % 10 for k, a in enumerate(train)}
    for k in ('train', 'val'): assert [true[a.tobytes()] for a in getattr(ds, k).numpy()] == ds.labels[k].tolist()
    assert load_images('fashion_mnist', tmp_path, val_size=10, size=32).test.shape == (20, 1, 32, 32)
    refused('val_size 10000', name='fashion_mnist', path=tmp_path)


@pytest.mark.parametrize('part', ['train', 't10k'])
@pytest.mark.parametrize('kind', ['images-idx3', 'labels-idx1'])
def test_damaged_idx_files(tmp_path, part, kind):
    raw, *_ = write_fashion(tmp_path); f = raw/f'{part}-{kind}-ubyte'
    whole = f.read_bytes(); bad = dict(name='fashion_mnist', path=tmp_path, val_size=10)
    for n in (5, 9, len(whole)//2, len(whole)-1): f.write_bytes(whole[:n]); refused(f, 'cut short', **bad)
    for junk in (b'', b'<html>404</html>', b'\x1f\x8b\x08' + bytes(100)): f.write_bytes(junk); refused(f, 'not an IDX file', **bad)
    f.unlink(); refused(f, 'is missing', 'put train-images', download=False, **bad)


def test_idx_files_that_do_not_belong_together(tmp_path):
    raw, *_ = write_fashion(tmp_path); bad = dict(name='fashion_mnist', path=tmp_path, val_size=10)
    write_idx(raw/'train-labels-idx1-ubyte', np.arange(59)); refused(raw, '59 labels', **bad)
    write_fashion(tmp_path); write_idx(raw/'t10k-images-idx3-ubyte', pixels(20, 32, 1)[..., 0]); refused(raw, '(20, 32, 32)', **bad)


def batch(k, n=12): return dict(data=pixels(n, 32, 3, k).transpose(0, 3, 1, 2).reshape(n, -1), labels=[(k + j) % 10 for j in range(n)])


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A CIFAR-10 of 60 + 12 pictures whose checksums torchvision takes for the published ones."
    from torchvision.datasets import CIFAR10
    home = tmp_path/CIFAR10.base_folder; home.mkdir(); lists = dict(train_list=[], test_list=[])
    def put(name, content): (home/name).write_bytes(data := pickle.dumps(content)); return [name, md5(data).hexdigest()]
    for k in range(6):
        lists['train_list' if k < 5 else 'test_list'].append(put(f'data_batch_{k+1}' if k < 5 else 'test_batch', batch(k)))
    for k, v in lists.items(): monkeypatch.setattr(CIFAR10, k, v)
    name, digest = put('batches.meta', dict(label_names=list('abcdefghij')))
    monkeypatch.setattr(CIFAR10, 'meta', dict(filename=name, key='label_names', md5=digest))
    return home


def test_small_cifar10(cifar):
    ds = load_images('cifar10', cifar.parent, val_size=6)
    assert ds.sizes == dict(train=54, val=6, test=12) and (ds.size, ds.channels, ds.classes) == (32, 3, list('abcdefghij'))
    assert (ds.test.numpy().reshape(12, -1) == batch(5)['data']).all() and ds.labels['test'].tolist() == batch(5)['labels']
    true = {a.tobytes(): c for k in range(5) for a, c in zip(batch(k)['data'], batch(k)['labels'])}
    for k in ('train', 'val'): assert [true[a.tobytes()] for a in getattr(ds, k).numpy()] == ds.labels[k].tolist()


class Bomb:
    def __reduce__(self): return (Path.touch, (Path(os.environ['VAE_NB_BOMB']),))


@pytest.mark.parametrize('name', ['data_batch_3', 'test_batch', 'batches.meta'])
def test_a_cifar_batch_with_another_checksum_is_never_opened(cifar, tmp_path, monkeypatch, name):
    monkeypatch.setenv('VAE_NB_BOMB', str(tmp_path/'exploded')); f = cifar/name; whole = f.read_bytes()
    for content in (pickle.dumps(Bomb()), whole[:-1], b''):
        f.write_bytes(content)
        for download in (True, False): refused(f, 'md5', name='cifar10', path=tmp_path, val_size=6, download=download)
    assert not (tmp_path/'exploded').exists()
    pickle.loads(pickle.dumps(Bomb())); assert (tmp_path/'exploded').exists(), "the bomb works"


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    "A CelebA of 20 + 6 + 4 pictures: a red frame around the middle square of 140, in which the left half is darker."
    from torchvision.datasets import CelebA
    home = tmp_path/CelebA.base_folder; (home/'img_align_celeba').mkdir(parents=True); names = [f'{k+1:06}.jpg' for k in range(30)]
    for k, n in enumerate(names):
        a = np.zeros((218, 178, 3), np.uint8); a[..., 0] = 255; a[39:179, 19:159] = 100 + 4*k; a[39:179, 19:89] -= 60
        Image.fromarray(a).save(home/'img_align_celeba'/n, quality=100, subsampling=0)
    rows = lambda f, head='': head + ''.join(f'{n} {f(k)}\n' for k, n in enumerate(names))
    texts = {'list_eval_partition.txt': rows(lambda k: (k >= 20) + (k >= 26)), 'identity_CelebA.txt': rows(lambda k: k),
             'list_attr_celeba.txt': rows(lambda k: '1 -1', '30\nSmiling Hat\n'),
             'list_bbox_celeba.txt': rows(lambda k: '1 2 3 4', '30\nid a b c d\n'),
             'list_landmarks_align_celeba.txt': rows(lambda k: ' '.join('1'*10), '30\n' + ' '.join('abcdefghij') + '\n')}
    for n, t in texts.items(): (home/n).write_text(t)
    listed = [('', md5(t.encode()).hexdigest(), n) for n, t in texts.items()]
    monkeypatch.setattr(CelebA, 'file_list', [('', '0'*32, 'img_align_celeba.zip'), *listed])
    return home


def test_small_celeba(celeba):
    ds = load_images('celeba64', celeba.parent); x = ds.test.int()
    assert ds.sizes == dict(train=20, val=6, test=4) and (ds.size, ds.channels, ds.labels) == (64, 3, {})
    assert '140' in ds.meta['resized'] and ds.meta['crop'] == 140
    assert (x[:, 0] - x[:, 1]).abs().max() < 30, "the red frame is cropped away"
    right, left = x[:, 1, 5:-5, 40:60].float().mean((1, 2)), x[:, 1, 5:-5, 4:24].float().mean((1, 2))
    want = torch.tensor([100. + 4*k for k in range(26, 30)])
    assert (right - want).abs().max() < 2 and (left - want + 60).abs().max() < 2, "the test part, in its order"
    assert load_images('celeba64', celeba.parent, size=32, limit=2).train.shape == (2, 3, 32, 32)


def test_broken_celeba(celeba):
    bad = dict(name='celeba64', path=celeba.parent); f = celeba/'img_align_celeba'/'000028.jpg'; whole = f.read_bytes()
    f.write_bytes(whole[:900]); refused(f, 'cannot be read', **bad)
    Image.fromarray(pixels(1, 100)[0]).save(f); refused(f, 'too small for a crop of 140', **bad)
    f.unlink(); refused(f, 'No such file', **bad); f.write_bytes(whole)
    t = celeba/'list_eval_partition.txt'; text = t.read_text(); t.write_text(text[:-5]); refused(t, 'md5', **bad); t.write_text(text)
    (celeba/'img_align_celeba').rename(celeba/'elsewhere'); refused('img_align_celeba is missing', download=False, **bad)


# No network

network_errors = [urllib.error.URLError('Name or service not known'), socket.timeout('timed out'), ConnectionResetError(104, 'reset'),
                  urllib.error.HTTPError('http://x', 503, 'Service Unavailable', None, None)]

@pytest.mark.parametrize('error', network_errors, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('name, file', [('fashion_mnist', 'train-images-idx3-ubyte'), ('cifar10', 'data_batch_1'),
                                        ('celeba64', 'img_align_celeba')])
def test_without_a_network(tmp_path, monkeypatch, name, file, error):
    calls = []
    def fails(*a, **k): calls.append(socket.getdefaulttimeout()); raise error
    monkeypatch.setattr(urllib.request, 'urlopen', fails)
    refused(f'{tmp_path}{os.sep}', file, 'could not be downloaded', 'Is there a network?', name=name, path=tmp_path)
    assert len(calls) <= 2 and all(c and c <= 20 for c in calls), "one attempt, and not for ever"
    assert socket.getdefaulttimeout() is None


def test_a_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    "A real socket that accepts and is silent; patience is made short for the test."
    import vae_nb.data.images as I
    from torchvision.datasets import FashionMNIST
    silent = socket.create_server(('127.0.0.1', 0)); short = I._patience
    monkeypatch.setattr(FashionMNIST, 'mirrors', [f'http://127.0.0.1:{silent.getsockname()[1]}/'])
    monkeypatch.setattr(I, '_patience', lambda: short(.2))
    try: refused('could not be downloaded', 'timed out', name='fashion_mnist', path=tmp_path)
    finally: silent.close()


def test_a_truncated_download_is_found(tmp_path, monkeypatch):
    "The .gz that an interrupted download left: its checksum is wrong, it is fetched again, and there is no network."
    def fails(*a, **k): raise urllib.error.URLError('no route')
    monkeypatch.setattr(urllib.request, 'urlopen', fails)
    raw = tmp_path/'FashionMNIST'/'raw'; raw.mkdir(parents=True)
    (raw/'train-images-idx3-ubyte.gz').write_bytes(b'\x1f\x8b\x08' + bytes(40))
    refused('train-images-idx3-ubyte', 'could not be downloaded', name='fashion_mnist', path=tmp_path)


def test_the_data_folder_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('x')
    for name in ('fashion_mnist', 'cifar10'): refused(tmp_path/'file', name=name, path=tmp_path/'file')


# Black and white, flips and sheets

@pytest.fixture
def small(tmp_path): write_fashion(tmp_path); return load_images('fashion_mnist', tmp_path, val_size=10)


def test_binarised_by_the_published_recipe(small):
    rng = np.random.RandomState(777); val, test, train = (rng.binomial(1, getattr(small, k).numpy()/255.) for k in ('val', 'test', 'train'))
    dynamic, static = (binarise_images(small, h) for h in ('dynamic', 'static'))
    for ds in (dynamic, static): assert (ds.val.numpy() == val).all() and (ds.test.numpy() == test).all()
    assert torch.equal(dynamic.train, small.train) and (static.train.numpy() == train).all()
    assert all(getattr(b, k).dtype == torch.uint8 for b in (dynamic, static) for k in SPLITS)
    assert small.meta['binarise'] == 'none' and small.val.max() > 1, "the grey set stays as it was"
    assert binarise_images(small, 'none') is small
    for how in BINARISE[1:]:
        for again in BINARISE[1:]:
            with pytest.raises(UserError, match='binarised already'): binarise_images(binarise_images(small, how), again)


def test_draws_and_flips_are_repeatable_and_leave_their_input(small):
    x = small.train; before = x.clone()
    for f in (draw_binary, flip_images):
        a, b, c = (f(x, new_generator(s, 'x')) for s in (0, 0, 1))
        assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == torch.uint8 and a.shape == x.shape
    assert torch.equal(x, before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_draws_and_flips_on_a_gpu(small):
    x = small.train.cuda()
    for f in (draw_binary, flip_images):
        a, b = (f(x, new_generator(0, 'x', device='cuda')) for _ in range(2)); assert a.is_cuda and torch.equal(a, b)


@pytest.mark.parametrize('n, ncols, shape', [(7, 3, (3, 3)), (3, 8, (1, 3)), (1, 1, (1, 1)), (8, 0, (8, 1))])
@pytest.mark.parametrize('channels', [1, 3])
def test_a_sheet_holds_every_picture_at_its_place(n, ncols, shape, channels):
    x = torch.from_numpy(pixels(n, 16, channels).transpose(0, 3, 1, 2).copy()); g = image_grid(x, ncols)
    assert g.shape[:2] == (shape[0]*17-1, shape[1]*17-1) and g.dtype == np.uint8 and g.ndim == (3 if channels == 3 else 2)
    for k in range(n):
        i, j = divmod(k, shape[1]); cell = g[i*17:i*17+16, j*17:j*17+16]
        assert (cell.reshape(16, 16, channels) == x[k].permute(1, 2, 0).numpy()).all()
    assert image_grid(x.numpy(), ncols).tobytes() == g.tobytes()


def test_sheets_refuse_what_they_cannot_show():
    black = lambda *shape: torch.zeros(shape, dtype=torch.uint8)
    for bad in (black(3, 32, 32), black(3, 2, 32, 32), black(0, 1, 8, 8), torch.zeros(3, 1, 8, 8)):
        with pytest.raises(UserError, match='uint8'): image_grid(bad)


def test_show_images_draws_on_the_axes_it_is_given():
    import matplotlib.pyplot as plt
    x = torch.zeros(4, 1, 16, 16, dtype=torch.uint8); _, ax = plt.subplots()
    assert show_images(x, 2, ax, title='four') is ax and ax.get_title() == 'four' and ax.images[0].get_clim() == (0, 255)
    assert show_images(x) is not ax
    plt.close('all')


# The real sets, where they are

def has(*parts): return DATA.joinpath(*parts).exists()


@pytest.mark.skipif(not has('FashionMNIST', 'raw', 'train-images-idx3-ubyte'), reason="Fashion-MNIST is not in the data folder")
def test_the_complete_fashion_mnist():
    ds = load_images('fashion_mnist', download=False)
    assert ds.sizes == dict(train=50_000, val=10_000, test=10_000) and (ds.channels, ds.size) == (1, 28)
    x = torch.cat([ds.train, ds.val]).double()/255
    assert abs(float(x.mean()) - .2860) < 1e-4 and abs(float(x.std()) - .3530) < 1e-4        # as published
    assert torch.cat([ds.labels['train'], ds.labels['val']]).bincount().tolist() == [6000]*10
    assert ds.labels['test'].bincount().tolist() == [1000]*10
    assert ds.labels['val'].bincount().min() > 900, "the validation set is a random part"
    assert ds.meta['split_hash'] == load_images('fashion_mnist', download=False).meta['split_hash'] and ds.meta['limit'] == 0


@pytest.mark.skipif(not has('cifar10-jpeg', 'test.tar'), reason="the JPEG copy of CIFAR-10 is not in the data folder")
def test_the_jpeg_copy_of_cifar10():
    ds = load_images('images', DATA/'cifar10-jpeg'/'test.tar', limit=300)
    assert ds.sizes == dict(train=300, val=300, test=300) and (ds.channels, ds.size, len(ds.classes)) == (3, 32, 10)
    assert ds.classes[0] == 'airplane' and ds.labels['train'].bincount().min() > 10 and len(everything(ds)) == 900


def test_every_set_has_a_name_the_configuration_knows():
    from vae_nb.training.config import worlds
    assert set(IMAGE_SETS) == set(worlds) - {'grids'}
