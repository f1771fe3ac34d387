//! Program `skein-agent`: runs the command line and converts failures to exit codes.

use std::process::ExitCode;

use skein_agent::app;
use skein_agent::failure::Failure;

fn main() -> ExitCode {
    match app::main() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Standard error may be closed. The exit code still reports the failure.
            let _ = std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("skein-agent: {failure}\n"),
            );
            ExitCode::from(code(&failure))
        }
    }
}

fn code(failure: &Failure) -> u8 {
    match failure {
        Failure::Runtime(_) => 1,
        Failure::Usage(_) => 2,
        Failure::Privilege(_) => 3,
        Failure::Missing(_) => 4,
        Failure::InUse(_) => 5,
    }
}
