"What holds the house together: settings that agree, notebooks that are small and clean, a package that is what they export."
import ast, json, re, subprocess, tempfile, tomllib
from pathlib import Path
import pytest
from conftest import ROOT
from vae_nb.core import load_settings

S = load_settings(ROOT)
BOOK, EXPERIMENTS = sorted(S.nbs.glob('*.ipynb')), sorted(S.experiments.glob('*.ipynb'))
by_name = dict(argvalues=BOOK + EXPERIMENTS, ids=lambda p: p.stem)
read = lambda p: json.loads(p.read_text())
source = lambda c: ''.join(c['source'])

def git(*args):
    r = subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True)
    return r.stdout if r.returncode == 0 else None

def test_settings_agree():
    project = tomllib.loads((ROOT/'pyproject.toml').read_text()); nbdev = project['tool']['nbdev']
    assert S.nbs == ROOT/nbdev['nbs_path'] and nbdev['lib_path'] == project['project']['name']
    assert 'tags' in nbdev['allowed_cell_metadata_keys']        # or nbdev-clean removes papermill's parameters tag

@pytest.mark.parametrize('path', **by_name)
def test_notebook_is_small_and_without_errors(path):
    nb = read(path); assert path.stat().st_size < 150_000
    assert not [o for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs'] if o['output_type'] == 'error']
    assert len({c['id'] for c in nb['cells']}) == len(nb['cells'])

@pytest.mark.parametrize('path', [p for p in BOOK if p.stem != 'index'], ids=lambda p: p.stem)
def test_notebook_begins_with_a_title_and_a_purpose(path):
    first = source(read(path)['cells'][0]); assert re.match(r'# .+\n\n> \S', first), first[:80]

@pytest.mark.parametrize('path', EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_has_parameters_and_profiles(path):
    from vae_nb.runs import load_profiles, resolve_params
    assert {'tiny', 'quick', 'full'} <= set(load_profiles(path))
    for profile in load_profiles(path): assert resolve_params(path, profile)['profile'] == profile

def exports():
    "{module: [notebooks that export it]}"
    res = {}
    for p in BOOK:
        found = (re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M) for c in read(p)['cells'])
        for m in filter(None, found): res.setdefault('vae_nb.' + m[1], []).append(p)
    return res

def test_each_module_has_one_notebook_and_each_notebook_its_module():
    assert all(len(v) == 1 for v in exports().values()), exports()
    have = {str(p.relative_to(ROOT)) for p in (ROOT/'vae_nb').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py')}
    assert have == {m.replace('.', '/') + '.py' for m in exports()}

def test_rooms_import_only_from_their_floor_and_below():
    floor = {m: int(p[0].name[0]) for m, p in exports().items()}
    for name, level in floor.items():
        text = (ROOT/(name.replace('.', '/') + '.py')).read_text()
        package = name.rsplit('.', 1)[0]
        for dots, target in re.findall(r'^(?:from) (\.+)([\w.]*) import', text, re.M):
            base = package if len(dots) == 1 else package.rsplit('.', len(dots) - 1)[0]
            full = f'{base}.{target}' if target else base
            if full in floor: assert floor[full] <= level, f'{name} imports upward from {full}'

def test_what_git_keeps():
    files = git('ls-files')
    if files is None: pytest.skip('not a git checkout')
    files = files.splitlines()
    assert not [f for f in files if re.match(r'(runs|data)/', f) or f.endswith(('.safetensors', '.pt', '.npz', '.pkl'))]
    for p in (ROOT/'vae_nb').rglob('*.py'):
        assert git('check-ignore', '-q', str(p.relative_to(ROOT))) is None, f'{p} is git-ignored'

def test_no_saved_text_names_a_folder_of_this_machine():
    "Outputs of notebooks, reports and results hold relative paths only."
    files = git('ls-files', '--cached', '--others', '--exclude-standard')
    if files is None: pytest.skip('not a git checkout')
    here = re.compile('|'.join(re.escape(f'{p}/') for p in (ROOT, Path.home(), Path(tempfile.gettempdir()))))
    for f in files.splitlines():
        p = ROOT/f
        if p.suffix in ('.ipynb', '.md', '.html', '.json') and p.exists():
            found = here.search(p.read_text()); assert not found, f'{f}: {found}'

def test_nothing_is_defined_twice():
    "Neither at the top of a module nor, by `@patch`, in a class."
    for name in exports():
        seen = set()
        for f in ast.parse((ROOT/(name.replace('.', '/') + '.py')).read_text()).body:
            if not isinstance(f, (ast.FunctionDef, ast.ClassDef)): continue
            patched = any(isinstance(d, ast.Name) and d.id == 'patch' for d in f.decorator_list)
            what = f'{ast.unparse(f.args.args[0].annotation)}.{f.name}' if patched else f.name
            assert what not in seen, f'{name} defines {what} twice'; seen.add(what)
