"""What the machinery of a study costs, beside the bare notebook; and what planning costs.

    python benchmarks/study.py [--jobs 6]
    python benchmarks/study.py --gain experiments/validation.yaml --size quick --seeds 2 --side 1 2      # on a GPU: --size full --side 1 4

Measured on two cores of an AMD EPYC, alone: an empty notebook takes 1.65 s by `vae-nb run` and 2.19 s as a job of
a study, start and end of the study included. So the machinery costs 0.5 s a job, 0.9 % of a job of one minute. A plan of 100,000 cells
takes 1.7 s, 1.8 s where the store holds them all; adding them takes 3.0 s, and adding them again 1.4 s, which adds nothing.
On a slower machine of that name (an empty notebook takes 4.6 s there): 1.0 s a job, 1.7 %; a plan 2.3 to 2.8 s, more than the two seconds
that were wanted. Reading which modules a notebook uses, for its key, is not seen in these figures (before: 1.06 s a job, plan 2.8 s).

Two jobs at once on two cores, quick size of the validation study: 167 jobs an hour against 88 one after the other, 1.9 times as many;
a job takes 40 s beside another and 38 s alone. Several jobs on one graphics card have not been measured yet.
"""
import argparse, contextlib, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat, yaml

from vae_nb.core import hardware, load_settings
from vae_nb.studies.spec import jobs_of, load_spec
from vae_nb.studies.store import Store
from vae_nb.study import Study, planned

VAE_NB = str(Path(sys.executable).with_name('vae-nb'))


def project(root):
    (root/'experiments').mkdir(); (root/'settings.ini').write_text((load_settings().root/'settings.ini').read_text())
    (root/'vae_nb').symlink_to(load_settings().root/'vae_nb')
    cells = ["profile: str = 'quick'\nseed: int = 0\nsize: float = 0.",
             "from vae_nb.runs import open_run\nrun = open_run('toy', globals())",
             "run.finish(nelbo=70. + seed)"]
    made = [nbformat.v4.new_code_cell(c, id=f'c{i}') for i, c in enumerate(cells)]; made[0].metadata = dict(tags=['parameters'])
    meta = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=meta), root/'experiments'/'toy.ipynb')


def timed(*args, cwd):
    start = time.time(); p = subprocess.run([VAE_NB, *args], cwd=cwd, capture_output=True, text=True)
    if p.returncode: raise SystemExit(p.stderr)
    return time.time() - start


def overhead(root, n):
    "Seconds a job: the bare notebook by `vae-nb run`, one process after the other; the same jobs as a study, one at a time."
    bare = timed_all = 0.
    for s in range(n): bare += timed('run', 'toy', '--seed', str(1000 + s), cwd=root)
    (root/'study.yaml').write_text(f"study: cost\nnotebook: toy\nseeds: {{phase1: {n}}}\n")
    timed_all = timed('study', 'study.yaml', 'run', '--jobs', '1', cwd=root)
    return bare/n, timed_all/n


def planning(root, configurations=500, seeds=200):
    sizes = list(map(float, range(configurations))); res = {}
    (root/'big.yaml').write_text(f"study: big\nnotebook: toy\naxes: {{size: {sizes}}}\nseeds: {{all: {seeds}}}\n")
    with contextlib.chdir(root):
        start = time.time(); s = Study('big.yaml', store=root/'big.db'); rows = planned(s); res['plan, nothing known'] = time.time() - start
        jobs = jobs_of(load_spec('big.yaml')); store = Store(root/'big.db')
        start = time.time(); store.add(jobs, whole=True); res['add'] = time.time() - start
        start = time.time(); again = store.add(jobs, whole=True); res['add again'] = time.time() - start; assert again == 0
        start = time.time(); planned(Study('big.yaml', store=root/'big.db')); res['plan, all in the store'] = time.time() - start
    return len(rows), res


def gain(root, spec, size, seeds, side):
    "Jobs an hour of the study at `spec` for each number of jobs at once, each time from nothing."
    spec = Path(spec).resolve(); raw = yaml.safe_load(spec.read_text())
    raw['profiles'] = {size: raw['profiles'][size] | dict(seeds=dict(all=seeds))}; raw.pop('seeds'); res = {}
    for n in side:
        here = root/f'side{n}'; here.mkdir(); (here/'settings.ini').write_text((load_settings().root/'settings.ini').read_text())
        (here/'vae_nb').symlink_to(load_settings().root/'vae_nb'); shutil.copytree(spec.parent, here/'experiments')
        (here/'study.yaml').write_text(yaml.safe_dump(raw, sort_keys=False))
        seconds = timed('study', 'study.yaml', 'run', '--profile', size, '--jobs', str(n), cwd=here)
        store = Store(here/'runs'/'studies.db'); rows = [r for s in store.studies() for r in store.runs(s)]
        res[n] = len(rows), seconds, sum(r.seconds for r in rows)/len(rows)
    return res


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--jobs', type=int, default=6, help="jobs each way")
    p.add_argument('--gain', help="YAML of a study: what running several jobs at once brings")
    p.add_argument('--size', default='quick', help="with --gain: profile of the study")
    p.add_argument('--seeds', type=int, default=2, help="with --gain: random seeds of each configuration")
    p.add_argument('--side', type=int, nargs='+', default=[1, 2], help="with --gain: how many at once, each tried"); a = p.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1'); h = hardware(); print(f"{h['cpu']}, {h['cores']} cores")
    with tempfile.TemporaryDirectory() as d:
        root = Path(d).resolve()
        if a.gain:
            for n, (jobs, seconds, each) in gain(root, a.gain, a.size, a.seeds, a.side).items():
                print(f'{n} at once: {jobs} jobs in {seconds:.0f} s, {3600*jobs/seconds:.0f} an hour; {each:.0f} s each')
            return
        project(root); timed('run', 'toy', '--seed', '999', cwd=root)          # caches are warm for both
        bare, study = overhead(root, a.jobs)
        print(f'bare notebook by vae-nb run: {bare:.2f} s; as a job of a study: {study:.2f} s, start and end of the study included')
        print(f'overhead: {study - bare:+.2f} s a job, {(study - bare)/60:+.1%} of a job of one minute')
        n, res = planning(root)
        print(f'{n:,} cells: ' + ', '.join(f'{k} {v:.2f} s' for k, v in res.items()))


if __name__ == '__main__': main()
