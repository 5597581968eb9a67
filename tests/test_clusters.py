"Studies on Ray, Slurm and SkyPilot: real engines on loopback where they are installed; what their death leaves behind."
import json, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace
import pytest, yaml
from conftest import Project, kernels, wait_for
from vae_nb.core import UserError
from vae_nb.runs import run_key
from vae_nb.studies import clusters
from vae_nb.studies.clusters import RayDispatcher, SkypilotDispatcher, SlurmDispatcher, make_dispatcher
from vae_nb.studies.dispatch import worker_processes
from vae_nb.studies.runner import find_notebook
from vae_nb.studies.scheduler import schedule
from vae_nb.studies.spec import Job
from vae_nb.studies.store import Store

class Study:
    "A store and the jobs of a toy experiment: it waits so long, then fails if it is told to."
    def __init__(self, root):
        self.root = root; p = Project(root)
        p.experiment('toy', "import os, time\nend = time.time() + wait\nwhile time.time() < end: time.sleep(.05)",
                     "if fail: raise ValueError('no data')",
                     "run.finish(nelbo=70. + seed, cards=os.environ.get('CUDA_VISIBLE_DEVICES', '-'))",
                     params='wait: float = 0.\nfail: bool = False\n')
        self.store = Store(root/'runs'/'studies.db')

    def job(self, seed, cpus=1, gpus=0., timeout=60, **kw):
        params = dict(profile='quick', seed=seed, wait=0., fail=False) | kw
        j = Job(run_key(find_notebook('toy'), params), 'study', f'all{seed}', seed, 'toy', params, cpus=cpus, gpus=gpus, timeout=timeout)
        self.store.add([j]); return j

    def state(self, j): return next(r.state for r in self.store.runs('study') if r.key == j.key)
    def outcomes(self, j): return [a['outcome'] for a in self.store.attempts(j.key)]
    def found(self, j): return [r for r in self.store.results('study') if r['key'] == j.key]
    def workers(self, j): return worker_processes(self.store.path, j.key)
    def left(self, j): return self.workers(j) + kernels(j.folder)
    def running(self, j): return self.state(j) == 'running' and kernels(j.folder)

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp('clusters').resolve(); old = os.getcwd(); os.chdir(root)
    run = os.environ.pop('VAE_NB_RUN', None)
    yield Study(root)
    os.chdir(old)
    if run: os.environ['VAE_NB_RUN'] = run

def follow(d, h, seconds=60):
    "Ask about a handle until it has ended; its last word."
    return wait_for(lambda: (w := d.poll([h])[h]) not in ('queued', 'running') and w, seconds, f'the end of {h}')

def work_off(study, d, jobs, seconds=60):
    "What a scheduler does: start what may start, ask, until nothing is left."
    handles, words, end = {}, {}, time.time() + seconds
    keys = {j.key for j in jobs}
    while any(study.state(j) in ('pending', 'running', 'stale') for j in jobs) or any(w in ('queued', 'running') for w in words.values()):
        assert time.time() < end, (words, [study.store.attempts(j.key) for j in jobs])
        words = d.poll(list(handles))
        busy = {handles[h] for h, w in words.items() if w in ('queued', 'running')}
        free = [r for r in study.store.runs('study') if r.key in keys and r.key not in busy]
        for r in schedule(free, d.slots()): handles[d.submit(r)] = r.key
        time.sleep(.1)
    return words

def family(pid):
    "A process and all that descend from it."
    parents = {}
    for p in filter(str.isdigit, os.listdir('/proc')):
        try: parents.setdefault(int(Path(f'/proc/{p}/stat').read_text().rsplit(')', 1)[1].split()[1]), []).append(int(p))
        except OSError: pass
    res = [pid]
    for p in res: res += parents.get(p, [])
    return res

def listening(pids):
    "Addresses on which processes listen: hexadecimal, as in /proc/net/tcp."
    inodes = set()
    for p in pids:
        try: inodes |= {os.readlink(f'/proc/{p}/fd/{f}') for f in os.listdir(f'/proc/{p}/fd')}
        except OSError: pass
    tables = [p.read_text() for n in ('tcp', 'tcp6') if (p := Path(f'/proc/net/{n}')).exists()]
    rows = [l.split() for t in tables for l in t.splitlines()[1:]]
    return [r[1].split(':')[0] for r in rows if r[3] == '0A' and f'socket:[{r[9]}]' in inodes]

loopback = {'0100007F', '0000000000000000FFFF00000100007F', '00000000000000000000000001000000'}

# ---- Ray: one, for all its tests ----
@pytest.fixture(scope='module')
def ray(place):
    pytest.importorskip('ray', reason="Ray is not installed: pip install 'vae_nb[ray]'")
    d = make_dispatcher('ray', place.store, cpus=2, gpus=['5'], lease=20.); handler = signal.getsignal(signal.SIGTERM)
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)           # as behind `&` in a script: what is started inherits it
    d.start(); signal.signal(signal.SIGINT, heard)
    assert signal.getsignal(signal.SIGTERM) is handler and 'RAY_AUTH_TOKEN' not in os.environ
    yield d
    mine = family(os.getpid()); d.close()
    wait_for(lambda: not [p for p in mine[1:] if p in family(os.getpid())], 30, 'the end of Ray'); assert not Path(d.folder).exists()

def test_ray_does_two_jobs_and_a_job_sees_its_card_only(place, ray):
    jobs = [place.job(0), place.job(1, gpus=.5)]
    work_off(place, ray, jobs)
    assert [place.outcomes(j) for j in jobs] == [['done'], ['done']]
    assert [(r['nelbo'], r['cards']) for j in jobs for r in place.found(j)] == [(70., ''), (71., '5')]
    assert wait_for(lambda: ray.slots() == ray.slots(whole=True), 20)

def test_ray_listens_on_loopback_only(ray):
    found = listening(family(os.getpid())); assert len(found) > 3 and set(found) <= loopback, found

def test_a_killed_ray_process_neither_loses_nor_doubles_a_job(place, ray):
    j = place.job(2, wait=3.); h = ray.submit(j); assert ray.submit(j) == h and ray.slots().cpus <= 1
    wait_for(lambda: place.running(j), what='the job'); (worker,) = place.workers(j)
    parent = int(Path(f'/proc/{worker}/stat').read_text().rsplit(')', 1)[1].split()[1])
    assert Path(f'/proc/{parent}/cmdline').read_text().startswith('ray::'); os.kill(parent, signal.SIGKILL)
    assert follow(ray, h).startswith('lost its Ray process died')
    assert place.state(j) == 'pending' and not place.left(j) and place.outcomes(j) == ['cancelled']   # given back by the worker itself
    work_off(place, ray, [j])
    assert place.outcomes(j) == ['cancelled', 'done'] and len(place.found(j)) == 1 and not place.left(j)

def test_a_ray_process_and_its_worker_killed_together(place, ray):
    j = place.job(3, wait=3.); h = ray.submit(j); wait_for(lambda: place.running(j), what='the job'); (worker,) = place.workers(j)
    parent = int(Path(f'/proc/{worker}/stat').read_text().rsplit(')', 1)[1].split()[1])
    for p in (worker, parent): os.kill(p, signal.SIGKILL)
    assert follow(ray, h).startswith('lost'); assert place.state(j) == 'pending' and not place.left(j)      # at once, not after the lease
    assert place.outcomes(j) == ['lost']

@pytest.mark.parametrize('force', [False, True])
def test_a_cancelled_task_leaves_no_process(place, ray, force):
    j = place.job(4 + force, wait=60.); h = ray.submit(j); wait_for(lambda: place.running(j), what='the job')
    ray.cancel(h, force=force)
    if not force: wait_for(lambda: not place.left(j), 60, 'the end of the job')      # a kernel may hear the first signal only by force
    assert not place.left(j) and follow(ray, h, 5) == 'ended stopped' and place.state(j) == 'pending'
    assert place.outcomes(j) == (['lost'] if force else ['cancelled'])

def test_what_cannot_run_on_ray_is_refused(place, ray):
    for kw in (dict(cpus=3), dict(gpus=2)):
        with pytest.raises(UserError, match='this Ray has 2 cores and 1 GPU'): ray.submit(place.job(6, **kw))

def test_a_job_that_cannot_start_on_ray_is_given_up(place, ray, monkeypatch):
    j = place.job(7); plan = ray.plan
    monkeypatch.setattr(ray, 'plan', lambda job: (p := plan(job)) | dict(argv=[*p['argv'][:5], '-c', 'raise SystemExit("no such module")']))
    work_off(place, ray, [j]); assert place.state(j) == 'failed'
    last = place.store.attempts(j.key)[-1]['reason']
    assert last == 'lost 3 times: the worker ended: exit code 1 without having begun (no such module)'

def test_ray_that_is_not_there(place, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(UserError, match=r"pip install 'vae_nb\[ray\]'"): make_dispatcher('ray', place.store, address='auto')
    with pytest.raises(UserError, match=r"pip install 'vae_nb\[ray\]'"): RayDispatcher(place.store, gpus=[]).submit(place.job(0))

# ---- Slurm: a whole one, on loopback ----
def slurm_files(d, nodes, gpus=0): # {name of a machine: (address, cores)}, the first with the controller
    "Write Slurm's files into `d`; the programs of the first machine, in the order in which they start."
    host = next(iter(nodes)); address = nodes[host][0]; (d/'munge.key').write_bytes(os.urandom(128)); (d/'munge.key').chmod(0o600)
    for f in ('state', *nodes): (d/f).mkdir()
    (d/'cgroup.conf').write_text('CgroupAutomount=no\n')
    (d/'gres.conf').write_text(''.join(f'Name=gpu File={f}\n' for f in ('/dev/null', '/dev/zero')[:gpus]))
    gres = f' Gres=gpu:{gpus}' if gpus else ''
    lines = '\n'.join(f'NodeName={n} NodeAddr={a} CPUs={cpus}{gres} State=UNKNOWN' for n, (a, cpus) in nodes.items())
    (d/'slurm.conf').write_text(f"""ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort=17817
SlurmdPort=17818
SlurmUser=root
AuthInfo=socket={d}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/%n/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0
ReturnToService=2
KillWait=25
GresTypes=gpu
{lines}
PartitionName=main Nodes={','.join(nodes)} Default=YES MaxTime=INFINITE State=UP
""")
    return [['munged', '-F', f'--key-file={d}/munge.key', f'--socket={d}/munge.socket', f'--pid-file={d}/munge.pid',
             f'--log-file={d}/munge.log', f'--seed-file={d}/munge.seed', '--num-threads=1'],
            ['slurmctld', '-D', '-c'], ['slurmd', '-D', '-N', host]]

@pytest.fixture(scope='module')
def slurm(place, tmp_path_factory):
    missing = [b for b in ('munged', 'slurmctld', 'slurmd', 'sbatch') if not shutil.which(b, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if missing: pytest.skip(f"Slurm is not installed here ({', '.join(missing)}): apt-get install slurm-wlm munge")
    if os.geteuid(): pytest.skip('only root can start the daemons of Slurm')
    d = Path(tempfile.mkdtemp(prefix='slurm-')); d.chmod(0o755)                 # munged wants a folder that others may look into
    env = dict(SLURM_CONF=str(d/'slurm.conf'), PATH=f"{os.environ['PATH']}:/usr/sbin:/sbin"); old = {k: os.environ.get(k) for k in env}
    os.environ |= env; started = []
    try:
        for argv in slurm_files(d, {os.uname().nodename: ('127.0.0.1', min(2, os.cpu_count()))}, gpus=2):
            out = open(d/f'{argv[0]}.out', 'wb'); started.append(subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
            if argv[0] == 'munged': wait_for(lambda: (d/'munge.socket').exists(), 20, 'munged')
        up = lambda: 'idle' in subprocess.run(['sinfo', '-h', '-o', '%t'], capture_output=True, text=True).stdout
        try: wait_for(up, 30, 'Slurm')
        except AssertionError: pytest.skip('Slurm did not start: ' + (d/'slurmctld.out').read_text()[-300:])
        s = make_dispatcher('slurm', place.store, lease=20.); s.pids = [p.pid for p in started]; yield s
    finally:
        subprocess.run(['scancel', '--me'], capture_output=True)
        for p in reversed(started): p.terminate()
        for p in reversed(started):
            try: p.wait(10)
            except subprocess.TimeoutExpired: p.kill(); p.wait()
        shutil.rmtree(d, ignore_errors=True)
        for k, v in old.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})

def test_slurm_does_two_jobs_and_a_job_sees_its_card_only(place, slurm):
    whole = slurm.slots(whole=True); assert whole.cpus >= 1 and len(whole.gpus) == 2
    jobs = [place.job(20), place.job(21, gpus=.5)]; assert 'to start at' in slurm.dry_run(jobs[0])
    work_off(place, slurm, jobs)
    assert [place.outcomes(j) for j in jobs] == [['done'], ['done']]
    (a, b) = [r['cards'] for j in jobs for r in place.found(j)]; assert a == '' and b in ('0', '1')
    assert set(listening(slurm.pids)) <= loopback and len(listening(slurm.pids)) == 2

def test_a_job_is_handed_to_slurm_once(place, slurm):
    j = place.job(22, wait=60.); h = slurm.submit(j)
    again = SlurmDispatcher(place.store)                                     # as after a crash of the scheduler
    assert slurm.submit(j) == h == again.submit(j); wait_for(lambda: place.running(j), what='the job')
    assert slurm.poll([h])[h] == 'running' and slurm.slots().cpus == slurm.slots(whole=True).cpus - 1 and again.submit(j) == h
    slurm.cancel(h); assert follow(slurm, h, 40) == 'ended stopped' and not place.left(j) and place.state(j) == 'pending'
    assert place.outcomes(j) == ['cancelled'] and slurm.submit(j) != h       # it may be had again
    slurm.cancel(slurm.submit(j), force=True)

def test_slurm_killed_by_force(place, slurm):
    j = place.job(23, wait=60.); h = slurm.submit(j); wait_for(lambda: place.running(j), what='the job')
    slurm.cancel(h, force=True); assert not place.left(j) and place.state(j) == 'pending' and place.outcomes(j) == ['lost']
    assert slurm.poll([h])[h].split()[0] in ('ended', 'lost')

def test_a_killed_worker_on_slurm_is_done_again(place, slurm):
    j = place.job(24, wait=2.); h = slurm.submit(j); wait_for(lambda: place.running(j), what='the job')
    os.kill(*place.workers(j), signal.SIGKILL)
    assert follow(slurm, h) == 'lost killed by SIGKILL' and place.outcomes(j) == ['lost'] and not place.left(j)
    work_off(place, slurm, [j]); assert place.outcomes(j) == ['lost', 'done'] and len(place.found(j)) == 1

def test_why_a_job_on_slurm_failed(place, slurm, monkeypatch):
    j = place.job(25, fail=True); h = slurm.submit(j); other = SlurmDispatcher(place.store); other.submit(j)
    assert follow(slurm, h) == 'ended failed'
    monkeypatch.setattr(other, 'states', lambda: {}); assert other.poll([h])[h] == 'ended failed'      # Slurm forgot it, the store did not
    assert place.store.attempts(j.key)[-1]['reason'].startswith('cell error: ValueError: no data')

def test_what_cannot_run_on_slurm_is_refused(place, slurm):
    for ask in (slurm.dry_run, slurm.submit):
        with pytest.raises(UserError, match='Slurm refused `sbatch`.*not available'): ask(place.job(26, gpus=3))

def test_a_job_whose_interpreter_is_missing_is_given_up(place, slurm, monkeypatch):
    j = place.job(27); monkeypatch.setattr(clusters, 'worker_argv', lambda *a: ['/no/python', '--key', a[1]])
    work_off(place, slurm, [j]); assert place.state(j) == 'failed'
    last = place.store.attempts(j.key)[-1]['reason']
    assert last.startswith('lost 3 times: the worker ended: exit code 127 (') and 'not found' in last

def test_a_queue_of_so_many_jobs(place, slurm):
    q = SlurmDispatcher(place.store, max_jobs=1); j = place.job(28, wait=30.); h = q.submit(j)
    assert q.slots().jobs == 0 and q.slots().take(j) is None and q.slots(whole=True).jobs == 1
    q.cancel(h); follow(q, h, 40); assert q.slots().jobs == 1

def test_slurm_that_is_silent(place, slurm, monkeypatch):
    conf = Path(os.environ['SLURM_CONF']); other = conf.with_name('silent.conf')
    other.write_text(conf.read_text().replace('17817', '17819') + 'MessageTimeout=2\n'); monkeypatch.setenv('SLURM_CONF', str(other))
    s = SlurmDispatcher(place.store); t = time.time()
    with pytest.raises(UserError, match="controller does not answer"): s.submit(place.job(30))
    assert s.slots().cpus == 0 and time.time() - t < 40
    s.patience = 0.
    with pytest.raises(UserError, match="controller does not answer"): s.slots()

def test_memory_that_ran_out_before_the_claim_counts_as_a_loss(place):
    class RayError(Exception): pass
    class OutOfMemoryError(RayError): pass
    class TaskCancelledError(RayError): pass
    def get(ref): raise OutOfMemoryError
    d, j = RayDispatcher(place.store, gpus=[]), place.job(33)
    d.ray = SimpleNamespace(wait=lambda refs, timeout: (refs, []), get=get, exceptions=SimpleNamespace(
        RayError=RayError, OutOfMemoryError=OutOfMemoryError, TaskCancelledError=TaskCancelledError))
    for h in '123': d.refs = {h: h}; d.keep(h, j, d.mark(j)); assert d.poll([h])[h] == 'lost Ray ended it because memory ran out'
    assert place.outcomes(j) == ['lost', 'lost', 'failed']                           # not round for ever

# ---- SkyPilot: its page against its own reader, its program played by another ----
def test_sky_reads_the_task(place):
    sky = pytest.importorskip('sky', reason='SkyPilot is not installed: pip install skypilot')
    d = SkypilotDispatcher(place.store, accelerator='L4', resources=dict(use_spot=True), task=dict(setup='true'))
    j = place.job(40, gpus=1); task = sky.Task.from_yaml_config(yaml.safe_load(d.plan(j)['yaml']))
    assert task.envs['VAE_NB_SEED'] == '40' and j.key in task.run and list(task.resources)[0].accelerators == {'L4': 1}

fake_sky = '''#!{python}
import json, os, subprocess, sys, yaml
state, args = {state!r}, sys.argv[1:]
jobs = json.load(open(state)) if os.path.exists(state) else []
if args[:2] == ['jobs', 'launch']:
    assert args[2:4] == ['-y', '--detach-run']; t = yaml.safe_load(open(args[4]))
    code = subprocess.run(['/bin/sh', '-c', t['run']], env=os.environ | t['envs']).returncode
    jobs.append(dict(job_id=len(jobs) + 1, job_name=t['name'], status='FAILED' if code else 'SUCCEEDED'))
elif args[:2] == ['jobs', 'queue']: print('a note'); print(json.dumps(jobs))
elif args[:2] == ['jobs', 'cancel']: jobs[-1]['status'] = 'CANCELLED'
json.dump(jobs, open(state, 'w'))
'''

def test_a_job_through_the_program_of_skypilot(place, tmp_path, monkeypatch):
    d = make_dispatcher('skypilot', place.store, python=sys.executable); j = place.job(41); bad = place.job(42, fail=True)
    monkeypatch.setenv('PATH', '/usr/bin:/bin')
    with pytest.raises(UserError, match='SkyPilot is not installed here'): d.submit(j)
    p = tmp_path/'sky'; p.write_text(fake_sky.format(python=sys.executable, state=str(tmp_path/'jobs.json'))); p.chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    h = d.submit(j); assert d.poll([h])[h] == 'ended done' and place.outcomes(j) == ['done'] and place.found(j)[0]['cards'] == ''
    h = d.submit(bad); assert d.poll([h])[h] == 'ended failed'
    assert [r['job_name'] for r in json.loads((tmp_path/'jobs.json').read_text())] == [d.label(j), d.label(bad)]
    p.write_text('#!/bin/sh\necho "no cloud access" >&2; exit 1\n')
    with pytest.raises(UserError, match='no cloud access.*`sky check`'): d.submit(place.job(43))
