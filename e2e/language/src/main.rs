//! Checks the language rules of CONTRIBUTING.md over all Rust and Markdown files of a tree and
//! exits with code 1 if a limit is exceeded.
//!
//! Usage: `skein-language [--list] [DIRECTORY]`. With `--list`, every hit is printed, not only
//! those of a rule whose limit is exceeded.

mod files;
mod report;
mod rules;
mod source;

use std::path::Path;
use std::process::ExitCode;

use report::Report;

fn main() -> anyhow::Result<ExitCode> {
    let mut list = false;
    let mut root = String::from(".");
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--list" => list = true,
            _ => root = argument,
        }
    }
    let mut report = Report::default();
    for file in files::rust(Path::new(&root))? {
        rules::check_rust(&file, &mut report)?;
    }
    for (name, text) in files::markdown(Path::new(&root))? {
        rules::check_markdown(&name, &text, &mut report);
    }
    print!("{}", report.render(list));
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
