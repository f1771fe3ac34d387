//! Lists of names in documents: each has exactly the names of the code.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use skein_core::UnreachableReason;
use skein_lab::cargo::workspace;

fn read(path: &str) -> Result<String> {
    fs::read_to_string(workspace().join(path)).with_context(|| path.to_owned())
}

/// Returns the source files of `directory`, without unit tests, joined.
fn sources(directory: &str) -> Result<String> {
    let (mut text, mut open) = (String::new(), vec![workspace().join(directory)]);
    while let Some(path) = open.pop() {
        if path.is_dir() {
            for entry in fs::read_dir(&path)? {
                open.push(entry?.path());
            }
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && !path.components().any(|part| part.as_os_str() == "tests")
        {
            text += code(&fs::read_to_string(&path)?);
        }
    }
    Ok(text)
}

/// Returns a source without its unit tests.
fn code(source: &str) -> &str {
    source.split("\nmod tests {").next().unwrap_or_default()
}

/// Returns the part of `text` between `start` and the next `end`.
fn between<'a>(text: &'a str, start: &str, end: &str) -> Result<&'a str> {
    let (_, rest) = text.split_once(start).with_context(|| format!("no {start:?}"))?;
    rest.split(end).next().with_context(|| format!("no {end:?}"))
}

/// Returns the rows of the table with this header below a heading of a document.
pub(super) fn rows(path: &str, heading: &str, header: &str) -> Result<Vec<Vec<String>>> {
    let document = read(path)?;
    let section = between(&document, &format!("\n## {heading}\n"), "\n## ")?;
    let table = between(section, &format!("\n| {header} |\n"), "\n\n")?;
    let cells = |row: &str| {
        let row = row.trim_start_matches("| ").trim_end_matches(" |");
        row.split(" | ").map(|cell| cell.trim().to_owned()).collect()
    };
    // The first line separates the header.
    Ok(table.lines().skip(1).map(cells).collect())
}

/// Returns the names in the first column of a table, without backquotes. A cell may list several.
fn first_column(path: &str, heading: &str, header: &str) -> Result<BTreeSet<String>> {
    let rows = rows(path, heading, header)?;
    let cells = rows.iter().filter_map(|row| row.first());
    let names = cells.flat_map(|cell| cell.split(", ")).map(|name| name.replace('`', ""));
    Ok(names.collect())
}

/// Returns the texts in double quotes.
fn literals(code: &str) -> impl Iterator<Item = String> {
    code.split('"').skip(1).step_by(2).map(str::to_owned)
}

/// Returns the texts of an enum of `report_values!` in agent/ipc/src/report.rs.
fn report_values(name: &str) -> Result<BTreeSet<String>> {
    let source = read("agent/ipc/src/report.rs")?;
    let block = between(&source, &format!("\n    {name} {{\n"), "\n    }\n")?;
    Ok(literals(block).collect())
}

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

#[test]
fn peer_states_and_their_reasons_are_documented() -> Result<()> {
    let states = first_column("docs/operations.md", "Peers", "state | meaning")?;
    assert_eq!(states, report_values("PeerState")?);
    let rows = rows("docs/operations.md", "Peers", "reason | label | meaning")?;
    let documented: Vec<_> = rows.iter().map(|row| (row[0].clone(), row[1].clone())).collect();
    let reasons = UnreachableReason::OF_UNREACHABLE;
    let expected =
        reasons.map(|reason| (reason.text().to_owned(), format!("`{}`", reason.label())));
    assert_eq!(documented, expected);
    Ok(())
}

#[test]
fn offload_capabilities_are_documented() -> Result<()> {
    let header = "capability | requires | fallback";
    let documented = first_column("docs/architecture.md", "Offload capabilities", header)?;
    assert_eq!(documented, report_values("CapabilityName")?);
    Ok(())
}

#[test]
fn exit_codes_are_documented() -> Result<()> {
    let source = read("agent/src/main.rs")?;
    let failures = source.lines().filter(|line| line.trim_start().starts_with("Failure::"));
    let codes = failures.filter_map(|line| line.split(" => ").nth(1)?.strip_suffix(','));
    let codes: BTreeSet<_> = codes.chain(["0"]).map(str::to_owned).collect();
    ensure!(codes.len() > 2, "Only the codes {codes:?} are found.");
    assert_eq!(first_column("docs/operations.md", "Exit codes", "code | meaning")?, codes);
    Ok(())
}

#[test]
fn requests_of_the_control_socket_are_documented() -> Result<()> {
    let source = read("agent/src/control/server.rs")?;
    let source = code(&source);
    let routes = source.split(".route(").skip(1).filter_map(|route| {
        let (path, rest) = route.split_once(", ")?;
        let method = rest.split('(').next()?.to_uppercase();
        Some(format!("{method} {}", path.trim_matches('"')))
    });
    let heading = "The control socket";
    let documented = first_column("docs/commands.md", heading, "request | body | answer")?;
    // A documented path may have a query.
    let documented: BTreeSet<_> =
        documented.iter().filter_map(|request| request.split('?').next()).collect();
    let routes: BTreeSet<_> = routes.collect();
    assert_eq!(documented, routes.iter().map(String::as_str).collect());
    let number = |name: &str| {
        Ok(match name {
            "NO_CONTENT" | "SWITCHING_PROTOCOLS" => None,
            "NOT_FOUND" => Some(404),
            "METHOD_NOT_ALLOWED" => Some(405),
            "CONFLICT" => Some(409),
            "UNPROCESSABLE_ENTITY" => Some(422),
            "UPGRADE_REQUIRED" => Some(426),
            "INTERNAL_SERVER_ERROR" => Some(500),
            "BAD_GATEWAY" => Some(502),
            "SERVICE_UNAVAILABLE" => Some(503),
            name => anyhow::bail!("This test does not know the status {name}."),
        })
    };
    let constants = source.split("StatusCode::").skip(1).map(|rest| {
        number(rest.split(|c: char| !c.is_uppercase() && c != '_').next().unwrap_or_default())
    });
    let constants = constants.collect::<Result<Vec<Option<u16>>>>()?;
    // axum refuses a body with these.
    let codes = constants.into_iter().flatten().chain([400, 413, 415]);
    let documented = first_column("docs/commands.md", heading, "status | meaning")?;
    assert_eq!(documented, codes.map(|code| code.to_string()).collect());
    Ok(())
}

#[test]
fn kubernetes_events_and_conditions_are_documented() -> Result<()> {
    let source = read("agent/src/control/kubernetes/publish.rs")?
        + &sources("agent/src/control/kubernetes/publish")?;
    let calls = source.split(".report(node,").skip(1);
    let events = calls.filter_map(|call| literals(call.split(')').next()?).next());
    let heading = "Requests to the API server";
    let documented = first_column("docs/kubernetes.md", heading, "event | meaning")?;
    assert_eq!(documented, events.collect());
    let source = read("agent/src/control/kubernetes/status.rs")?;
    let constants = code(&source).lines().filter(|line| line.starts_with("const "));
    let conditions = constants.filter(|line| line.contains(": &str = ")).flat_map(literals);
    let rows = rows("docs/kubernetes.md", "SkeinNode", "field | source")?;
    let status = rows.iter().find(|row| row[0] == "`status`").context("no row of the status")?;
    let (_, documented) = status[1].split_once("conditions ").context("no conditions")?;
    let documented = documented.replace(" and ", ", ");
    let documented: BTreeSet<_> = documented.split(", ").map(str::to_owned).collect();
    assert_eq!(documented, conditions.collect());
    Ok(())
}

#[test]
fn cni_error_codes_are_documented() -> Result<()> {
    let types = read("cni-plugin/protocol/src/types.rs")?;
    let variants = between(&types, "pub enum ErrorCode {", "\n}")?.lines();
    let variants: Vec<_> =
        variants.filter_map(|line| line.trim().trim_end_matches(',').split_once(" = ")).collect();
    let source =
        sources("cni-plugin/src")? + &sources("agent/src/cni")? + &sources("agent/ipam/src")?;
    let used = variants.iter().filter(|(name, _)| source.contains(&format!("ErrorCode::{name}")));
    // Codes from 100 belong to the plugin.
    let own = source.split(": u32 = ").skip(1).filter_map(|rest| rest.split(';').next());
    let own = own.filter(|code| code.len() == 3);
    let codes: BTreeSet<_> = used.map(|(_, code)| *code).chain(own).map(str::to_owned).collect();
    assert_eq!(first_column("docs/pods.md", "CNI plugin", "code | meaning")?, codes);
    Ok(())
}

#[test]
fn alert_severities_are_documented() -> Result<()> {
    let rules = read("charts/skein/alerts/skein.yaml")?;
    let severities = rules.split("severity: ").skip(1);
    let severities = severities.filter_map(|rest| rest.split_whitespace().next());
    let severities: BTreeSet<_> = severities.map(str::to_owned).collect();
    let documented = first_column("docs/observability.md", "Alerts", "severity | meaning")?;
    assert_eq!(documented, severities);
    Ok(())
}

/// `skein-agent cleanup --state` removes the files, so that its code lists them.
#[test]
fn files_of_the_state_directory_are_documented() -> Result<()> {
    let cleanup = read("agent/src/control/cleanup.rs")?;
    let leases: Vec<_> = literals(between(&cleanup, "let leases = [", "];")?).collect();
    let others: Vec<_> = literals(between(&cleanup, "let others = [", "];")?).collect();
    ensure!(leases.len() > 1 && others.len() > 2, "Only {leases:?} and {others:?} are found.");
    let leases = leases.into_iter().map(|name| format!("cni/{name}"));
    // Files that are renamed when they are complete.
    let kept = leases.chain(others).filter(|name| !name.ends_with(".new"));
    let rotation = read("agent/src/control/rotation/files.rs")?;
    let suffixes = code(&rotation)
        .split("with_suffix(path, ")
        .skip(1)
        .flat_map(|rest| literals(rest).next().map(|suffix| format!("node.key{suffix}")));
    let mut files: BTreeSet<_> = kept.chain(suffixes).collect();
    files.extend(names(["node.key", "lock", "cni/deletions"]));
    let header = "file | contents";
    assert_eq!(first_column("docs/operations.md", "State directory", header)?, files);
    Ok(())
}
