//! Probe of a data process.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use skein_ipc::instance::Instance;
use skein_ipc::{PROTOCOL_VERSION, Request, Response, read_frame, write_frame};
use skein_sys::socket::connect_trusted;

/// Timeout of each step of a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Checks that the session manager of the data process at `socket` answers. Succeeds without a
/// check if `instance` does not have the data plane: the instance has no data process then.
///
/// # Errors
/// An error if no data process listens, if it does not answer within 3 s, or if its protocol
/// version differs.
pub fn probe(socket: &Path, instance: Option<&Instance>) -> anyhow::Result<()> {
    if instance.is_some_and(|instance| !instance.dataplane_marker().exists()) {
        return Ok(());
    }
    let shown = socket.display();
    let mut stream =
        connect_trusted(socket).with_context(|| format!("no data process answers on {shown}"))?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT)).context("cannot set the timeout")?;
    stream.set_write_timeout(Some(PROBE_TIMEOUT)).context("cannot set the timeout")?;
    let mut request = || {
        write_frame(&mut stream, &Request::Hello { version: PROTOCOL_VERSION })?;
        read_frame(&mut stream)
    };
    match request().with_context(|| format!("the data process on {shown} does not answer"))? {
        Some(Response::Hello { .. }) => Ok(()),
        Some(Response::Error { message, .. }) => bail!("{message}"),
        Some(_) | None => bail!("the program that listens on {shown} is not a data process"),
    }
}
