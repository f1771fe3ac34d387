//! containerd (with its libcni), runc and reference plugins of a Debian suite that is newer than
//! the system, unpacked outside the system's directories. apt fetches the packages from the
//! system's own mirror; the system does not change.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::process;
use crate::programs;

/// Debian suite of the packages: containerd 2.1, runc 1.3, reference plugins 1.9 (November 2026).
const SUITE: &str = "forky";
/// The packages, with the C library that runc needs.
const PACKAGES: [&str; 5] =
    ["containerd", "runc", "libc6", "libseccomp2", "containernetworking-plugins"];
/// Maximum time of one command of apt or dpkg.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);
/// Directories of apt's sources.
const APT: &str = "/etc/apt";

/// Returns the root directory of the unpacked packages, which are fetched at the first call.
/// Programs run with its `usr` as a layer over `/usr`, because they need its C library.
///
/// # Errors
/// If no source of the system's Debian release is configured (its mirror has the newer suite, too),
/// or if apt cannot fetch the packages. The message names the suite and the packages.
pub fn root() -> Result<PathBuf> {
    let root = programs::cache()?.join(format!("debian-{SUITE}"));
    if root.exists() {
        return Ok(root);
    }
    let needed = || format!("the tests need {} of Debian {SUITE}", PACKAGES.join(", "));
    let work = tempfile::tempdir_in(programs::cache()?)?;
    fetch(work.path()).with_context(needed)?;
    let unpacked = work.path().join("root");
    for file in fs::read_dir(work.path())? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg").arg("-x").arg(&path).arg(&unpacked)).with_context(needed)?;
        }
    }
    // The rename is atomic: another run may look for the directory at this moment, or may have
    // created it first.
    match fs::rename(&unpacked, &root) {
        Err(_) if root.exists() => {}
        renamed => renamed.with_context(|| root.display().to_string())?,
    }
    Ok(root)
}

/// Downloads the packages into `work`, with package lists and a cache of its own.
fn fetch(work: &Path) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.context("no VERSION_CODENAME in /etc/os-release: is it Debian?")?;
    let source = source(Path::new(APT), codename.trim_matches('"'))?;
    let list = work.join("newer.sources");
    fs::write(&list, source)?;
    for directory in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(work.join(directory))?;
    }
    let apt = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new("apt-get");
        command.current_dir(work).env("DEBIAN_FRONTEND", "noninteractive").arg("--quiet=2");
        for (key, value) in [
            ("Dir::Etc::SourceList", list.as_path()),
            ("Dir::Etc::SourceParts", Path::new("/dev/null")),
            ("Dir::State::Lists", &work.join("lists")),
            ("Dir::Cache", &work.join("cache")),
            ("Acquire::Languages", Path::new("none")),
            // The user _apt has no access to the directory.
            ("APT::Sandbox::User", Path::new("root")),
        ] {
            command.arg("-o").arg(format!("{key}={}", value.display()));
        }
        run(command.args(arguments))
    };
    apt(&["update"])?;
    let packages = PACKAGES.map(|package| format!("{package}/{SUITE}"));
    let mut arguments = vec!["download"];
    arguments.extend(packages.iter().map(String::as_str));
    apt(&arguments)
}

/// Returns a source of [`SUITE`] in deb822 format, with the mirror that `apt` has for the release
/// `codename`.
fn source(apt: &Path, codename: &str) -> Result<String> {
    let parts = fs::read_dir(apt.join("sources.list.d")).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = parts.map(|entry| entry.path()).collect();
    files.push(apt.join("sources.list"));
    files.sort();
    for file in files {
        let text = fs::read_to_string(&file).unwrap_or_default();
        let found = match file.extension().is_some_and(|extension| extension == "sources") {
            true => text.split("\n\n").find_map(|stanza| from_stanza(stanza, codename)),
            false => text.lines().find_map(|line| from_line(line, codename)),
        };
        if let Some((uri, signed_by)) = found {
            let mut source =
                format!("Types: deb\nURIs: {uri}\nSuites: {SUITE}\nComponents: main\n");
            if let Some(key) = signed_by {
                source += &format!("Signed-By: {key}\n");
            }
            return Ok(source);
        }
    }
    anyhow::bail!(
        "no source of Debian {codename} in {}: its mirror is needed for the suite {SUITE}",
        apt.display()
    )
}

/// Returns the mirror's address and the keyring of a stanza (sources.list(5), deb822) that has the
/// release.
fn from_stanza(stanza: &str, codename: &str) -> Option<(String, Option<String>)> {
    let field = |name: &str| {
        let mut lines = stanza.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    let has = |name: &str, word: &str| {
        field(name).is_some_and(|value| value.split_whitespace().any(|other| other == word))
    };
    if !has("Types", "deb") || !has("Suites", codename) || !has("Components", "main") {
        return None;
    }
    let uri = field("URIs")?.split_whitespace().next()?;
    Some((uri.to_owned(), field("Signed-By").filter(|key| !key.is_empty()).map(str::to_owned)))
}

/// Returns the mirror's address and the keyring of a line (`deb [options] URI suite components`)
/// that has the release.
fn from_line(line: &str, codename: &str) -> Option<(String, Option<String>)> {
    let rest = line.trim().strip_prefix("deb ")?.trim();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    if suite != codename || !words.any(|component| component == "main") {
        return None;
    }
    let key = options.split_whitespace().find_map(|option| option.strip_prefix("signed-by="));
    Some((uri.to_owned(), key.map(str::to_owned)))
}

fn run(command: &mut Command) -> Result<()> {
    let what = process::describe(command);
    let finished = process::finish(command, &[], COMMAND_TIMEOUT)?;
    ensure!(finished.code == 0, "`{what}`: {}{}", finished.stdout, finished.stderr);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_is_taken_from_the_release_of_the_system() -> Result<()> {
        let apt = tempfile::tempdir()?;
        let parts = apt.path().join("sources.list.d");
        fs::create_dir(&parts)?;
        let error = source(apt.path(), "bookworm").expect_err("there is no source");
        ensure!(error.to_string().contains(SUITE), "{error:#}");
        fs::write(
            parts.join("other.sources"),
            "Types: deb\nURIs: http://other.test\nSuites: stable\nComponents: main\n",
        )?;
        fs::write(
            parts.join("one.list"),
            "deb http://cloud.test bookworm-sdk main\n# deb x y z\n",
        )?;
        let list = "deb [arch=amd64 signed-by=/k.gpg] http://a.test/debian bookworm main contrib\n";
        fs::write(apt.path().join("sources.list"), list)?;
        let expected = |uri: &str, key: &str| {
            format!(
                "Types: deb\nURIs: {uri}\nSuites: {SUITE}\nComponents: main\nSigned-By: {key}\n"
            )
        };
        ensure!(source(apt.path(), "bookworm")? == expected("http://a.test/debian", "/k.gpg"));
        fs::write(
            parts.join("debian.sources"),
            "Types: deb\n# a comment\nURIs: http://b.test/security\nSuites: bookworm-security\n\
             Components: main\n\nTypes: deb deb-src\nURIs: http://b.test/debian\n\
             Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /b.gpg\n",
        )?;
        fs::remove_file(apt.path().join("sources.list"))?;
        ensure!(source(apt.path(), "bookworm")? == expected("http://b.test/debian", "/b.gpg"));
        Ok(())
    }
}
