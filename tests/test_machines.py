"""Studies over several machines: two that are made of Linux namespaces, each with its own name, network stack and process table, on one
disk. Ray and Slurm run over both; one of them loses its power in the middle."""
import contextlib, os, shutil, signal, subprocess, sys, tempfile
from pathlib import Path

import pytest
from conftest import Project, kernels, wait_for
from test_clusters import slurm_files

from vae_nb.studies.store import Store

BIN = Path(sys.executable).parent
NAMES = {'alpha': '10.77.0.1', 'beta': '10.77.0.2'}
INIT = 'hostname {name}; mount --bind {hosts} /etc/hosts; ip link set lo up; cat'       # until whoever made it is gone
STUDY = """study: toy
notebook: toy
configurations: {{plain: {{focal: false}}, focal: {{focal: true}}}}
seeds: {{phase1: {seeds}}}
resources: {{timeout: 60, cpus: {cpus}}}
engines:
  ray: {{address: '10.77.0.1:6400', lease: 8}}
  slurm: {{lease: 8}}
"""

class Machine:
    "Looks like a computer from inside; `off` is its power switch."
    def __init__(self, name, address, hosts):
        self.name, self.address = name, address
        self.shell = subprocess.Popen(['unshare', '-n', '-u', '-m', '-p', '-f', '--mount-proc', '--kill-child=KILL', 'sh', '-c',
                                       INIT.format(name=name, hosts=hosts)], stdin=subprocess.PIPE, start_new_session=True)
        def child():
            if self.shell.poll() is not None: raise OSError('this kernel, or who runs it, allows no namespaces')
            return Path(f'/proc/{self.shell.pid}/task/{self.shell.pid}/children').read_text().split()
        try:
            self.pid = wait_for(child, 60, f'process 1 of {name}')[0]
            wait_for(lambda: self('hostname', check=False).stdout.strip() == name, 60, name)
        except BaseException: self.shell.kill(); raise
        self.net = os.open(f'/proc/{self.pid}/ns/net', os.O_RDONLY)     # held: with the last process the other end of the cable would go

    def argv(self, *argv): return ['nsenter', '-t', self.pid, '-n', '-u', '-m', '-p', f'--wd={os.getcwd()}', *map(str, argv)]
    def __call__(self, *argv, check=True, **kw):
        return subprocess.run(self.argv(*argv), capture_output=True, text=True, check=check, timeout=120, **kw)
    def start(self, *argv, **kw): return subprocess.Popen(self.argv(*argv), text=True, stdin=subprocess.DEVNULL, **kw)
    def processes(self): # as the world outside sees them
        space = os.readlink(f'/proc/{self.pid}/ns/pid'); res = []
        for p in filter(str.isdigit, os.listdir('/proc')):
            with contextlib.suppress(OSError):
                if os.readlink(f'/proc/{p}/ns/pid') == space: res.append(int(p))
        return res
    def off(self):
        if self.shell.poll() is not None: return
        try: self('ip', 'link', 'set', 'wire', 'down', check=False)
        finally: os.kill(int(self.pid), signal.SIGKILL)      # with its process 1 the kernel ends all of a machine
        self.shell.wait(20); self.shell.stdin.close()

def cable(a, b):
    a('ip', 'link', 'add', 'wire', 'type', 'veth', 'peer', 'name', 'wire2')
    subprocess.run(['nsenter', '-t', a.pid, '-n', 'ip', 'link', 'set', 'wire2', 'netns', b.pid], check=True)
    b('ip', 'link', 'set', 'wire2', 'name', 'wire')
    for m in (a, b): m('ip', 'addr', 'add', f'{m.address}/24', 'dev', 'wire'); m('ip', 'link', 'set', 'wire', 'up')

@contextlib.contextmanager
def two_machines():
    missing = [p for p in ('unshare', 'nsenter', 'ip', 'hostname') if not shutil.which(p)]
    if missing or os.geteuid(): pytest.skip(f"machines of namespaces need root{''.join(f', {p}' for p in missing)}")
    made, ends = [], contextlib.ExitStack(); hosts = Path(tempfile.mkdtemp(prefix='machines-'))/'hosts'
    hosts.write_text(''.join(f'{a} {n}\n' for n, a in (*NAMES.items(), ('localhost', '127.0.0.1'))))
    try:
        try:
            for name, address in NAMES.items():
                made.append(m := Machine(name, address, hosts)); ends.callback(os.close, m.net); ends.callback(m.off)
            cable(*made)
        except (OSError, subprocess.SubprocessError) as e: pytest.skip(f'no namespaces here: {e}')
        yield made
    finally:
        try: ends.close()                                   # each of them, whatever the others say
        finally: shutil.rmtree(hosts.parent, ignore_errors=True)

class Study:
    "A study that is started on the first machine."
    def __init__(self, root, alpha, engine):
        self.root, self.alpha, self.engine = root, alpha, engine; self.project = Project(root)
        self.project.experiment('toy', "from pathlib import Path\nimport os, time\n"
                                "open('trace.txt', 'a').write(f'{run.focal} {seed} {os.uname().nodename}\\n')",
                                "while not Path('go').exists(): time.sleep(.05)",
                                "open('ended.txt', 'a').write(f'{run.focal} {seed}\\n')\nrun.finish(nelbo=70. + seed - run.focal)",
                                params='focal: bool = False  # whether\n')
    def page(self, seeds, cpus=1): (self.root/'study.yaml').write_text(STUDY.format(seeds=seeds, cpus=cpus))
    def said(self): return (self.root/'said.txt').read_text()
    def start(self):
        with open(self.root/'said.txt', 'w') as f:
            return self.alpha.start(BIN/'vae-nb', 'study', 'study.yaml', 'run', '--on', self.engine, stdout=f, stderr=f,
                                    env=self.project.env())
    def ended(self, p, seconds=150, code=0):
        try: p.wait(seconds)
        except subprocess.TimeoutExpired: raise AssertionError('the study does not end: ' + self.said()[-3000:]) from None
        assert p.returncode == code, self.said()[-3000:]
    def interrupt(self):
        "Ctrl-C for the scheduler."
        for p in self.alpha.processes():
            with contextlib.suppress(OSError):
                if b'vae-nb\0study' in Path(f'/proc/{p}/cmdline').read_bytes(): os.kill(p, signal.SIGINT)
    @property
    def store(self): return Store(self.root/'runs'/'studies.db')
    def rows(self): return self.store.runs('toy') if (self.root/'runs'/'studies.db').exists() else []
    def running(self, n, seconds=60):
        "Rows at work, by the machine they are on; waits for `n`."
        def found():
            rows = [r for r in self.rows() if r.state == 'running' and kernels(r.folder)]
            return len(rows) >= n and {r.owner.rsplit(':', 1)[0]: r for r in rows}
        return wait_for(found, seconds, f'{n} running notebooks')
    def check_whole(self, cells):
        assert [r.state for r in self.rows()] == ['done']*cells and len(self.store.results('toy')) == cells
        ended = (self.root/'ended.txt').read_text().splitlines(); assert len(ended) == len(set(ended)) == cells, ended
        for r in self.rows(): assert sum(a['outcome'] == 'done' for a in self.store.attempts(r.key)) == 1
        wait_for(lambda: not [k for r in self.rows() for k in kernels(r.folder)], 30, 'an end of all processes')
        assert self.store.rows('pragma journal_mode')[0]['journal_mode'] == 'delete'

def run_and_lose_a_machine(root, alpha, beta, engine):
    study = Study(root, alpha, engine); study.page(1)
    p = study.start(); at = study.running(2); assert set(at) == {'alpha', 'beta'}     # one core each: one job each
    (root/'go').touch(); study.ended(p); study.check_whole(2)
    (root/'go').unlink(); study.page(2)
    if engine == 'ray':                                     # what Slurm has in its queue outlives the scheduler
        p = study.start(); rows = study.running(2).values(); study.interrupt(); study.ended(p, code=130)
        assert not [k for r in rows for k in kernels(r.folder)]
        assert [study.store.attempts(r.key)[-1]['outcome'] for r in rows] == ['cancelled']*2
    p = study.start(); lost = study.running(2)['beta']; beta.off()
    (root/'go').touch(); study.ended(p); study.check_whole(4)
    tries = study.store.attempts(lost.key); assert [a['outcome'] for a in tries][-2:] == ['lost', 'done']
    assert [a['owner'].split(':')[0] for a in tries][-2:] == ['beta', 'alpha']

# ---- Ray ----
RAY = dict(RAY_USAGE_STATS_ENABLED='0', RAY_health_check_period_ms='1000', RAY_health_check_timeout_ms='2000',
           RAY_health_check_failure_threshold='3', RAY_health_check_initial_delay_ms='5000',
           RAY_agent_register_timeout_ms='100000')          # a busy machine is slow, not broken

def ray_on(m, *where, cpus=1):
    how = [f'--num-cpus={cpus}', f'--node-ip-address={m.address}', '--object-store-memory=80000000', '--disable-usage-stats']
    m(BIN/'ray', 'start', *where, *how, env=os.environ | RAY)

@pytest.fixture
def ray_machines(monkeypatch, tmp_path):
    "Two machines, and a function that starts Ray on them with so many cores."
    pytest.importorskip('ray', reason="Ray is not installed: pip install 'vae_nb[ray]'")
    monkeypatch.delenv('VAE_NB_RUN', raising=False); monkeypatch.chdir(tmp_path); folder = tempfile.mkdtemp(prefix='ray-')
    def start(alpha, beta):
        ray_on(machines[0], '--head', '--port=6400', '--include-dashboard=false', f'--temp-dir={folder}', cpus=alpha)
        ray_on(machines[1], '--address=10.77.0.1:6400', cpus=beta); return machines
    try:
        with two_machines() as machines: yield start
    finally: shutil.rmtree(folder, ignore_errors=True)

def test_a_study_on_ray_over_two_machines_of_which_one_dies(tmp_path, ray_machines):
    run_and_lose_a_machine(tmp_path, *ray_machines(1, 1), 'ray')

def test_a_study_on_ray_says_what_it_waits_for_when_the_only_machine_that_could_hold_it_dies(tmp_path, ray_machines):
    alpha, beta = ray_machines(3, 5); study = Study(tmp_path, alpha, 'ray'); study.page(1, cpus=4)    # eight cores, but room for one
    p = study.start(); assert set(study.running(1)) == {'beta'}; beta.off()                           # the other is in Ray's queue
    wait_for(lambda: 'Waiting: ' in study.said(), 90, 'a word on what it waits for'); assert p.poll() is None
    line, = [l for l in study.said().splitlines() if l.startswith('Waiting: ')]
    assert 'needs 4 cores and 0 GPUs, but there are 3 cores and 0 GPUs here' in line
    study.interrupt(); study.ended(p, code=130)
    study.page(1, cpus=1); (tmp_path/'go').touch(); p = study.start(); study.ended(p); study.check_whole(2)

# ---- Slurm ----
@pytest.mark.parametrize('requeue', [False, pytest.param(True, marks=pytest.mark.slow)])     # two minutes until Slurm starts it again
def test_a_study_on_slurm_over_two_machines_of_which_one_dies(tmp_path, monkeypatch, requeue):
    monkeypatch.setenv('PATH', f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if missing := [b for b in ('munged', 'slurmctld', 'slurmd', 'sbatch') if not shutil.which(b)]:
        pytest.skip(f"Slurm is not installed here ({', '.join(missing)}): apt-get install slurm-wlm munge")
    monkeypatch.delenv('VAE_NB_RUN', raising=False); monkeypatch.chdir(tmp_path)
    d = Path(tempfile.mkdtemp(prefix='slurm-')); d.chmod(0o755); monkeypatch.setenv('SLURM_CONF', str(d/'slurm.conf'))
    try:
        with two_machines() as (alpha, beta):
            programs = slurm_files(d, {m.name: (m.address, 1) for m in (alpha, beta)})
            with open(d/'slurm.conf', 'a') as f: f.write(f'SlurmdTimeout=8\nJobRequeue={requeue:d}\n')
            for m, argv in [(alpha, argv) for argv in programs] + [(beta, ['slurmd', '-D', '-N', beta.name])]:
                m.start(*argv, stdout=open(d/f'{argv[0]}-{m.name}.out', 'wb'), stderr=subprocess.STDOUT)
                if argv[0] == 'munged': wait_for(lambda: (d/'munge.socket').exists(), 20, 'munged')
            wait_for(lambda: alpha('sinfo', '-h', '-N', '-o', '%t', check=False).stdout.split() == ['idle', 'idle'], 30, 'Slurm')
            run_and_lose_a_machine(tmp_path, alpha, beta, 'slurm')
    finally: shutil.rmtree(d, ignore_errors=True)
