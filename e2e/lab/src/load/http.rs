//! The least HTTP client that can read an agent's pages, and command a browser.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// What a server answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: String,
}

/// GET within five seconds.
pub fn get(server: SocketAddr, path: &str) -> Result<Answer> {
    send(server, "GET", path, None, Duration::from_secs(5))
}

/// One request over a connection of its own, with a body of JSON or none.
pub fn send(
    server: SocketAddr,
    method: &str,
    path: &str,
    body: Option<&str>,
    limit: Duration,
) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, limit)
        .with_context(|| format!("connecting to {server}"))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {server}\r\nAccept: */*\r\nConnection: close\r\n"
    );
    let content = body.map_or_else(String::new, |body| {
        let length = body.len();
        format!("Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
    });
    let end = if body.is_some() { "" } else { "\r\n" };
    stream.write_all(format!("{head}{content}{end}").as_bytes())?;
    read(&mut BufReader::new(stream)).with_context(|| format!("reading {path}"))
}

/// Reads an answer: as long as it says, or to the end of the connection.
fn read(stream: &mut BufReader<TcpStream>) -> Result<Answer> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.context("no HTTP answer")?;
    let (mut length, mut chunked) = (None, false);
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.trim().parse::<usize>().context("Content-Length")?);
        }
        chunked |= name.eq_ignore_ascii_case("transfer-encoding");
    }
    let mut body = vec![];
    match length {
        Some(length) => more(stream, &mut body, length)?,
        // Each part has its length before it (RFC 9112, 7.1).
        None if chunked => loop {
            line.clear();
            stream.read_line(&mut line)?;
            match usize::from_str_radix(line.trim(), 16).context("length of a chunk")? {
                0 => break,
                length => more(stream, &mut body, length)?,
            }
            stream.read_line(&mut line)?;
        },
        None => drop(stream.read_to_end(&mut body)?),
    }
    Ok(Answer { status, body: String::from_utf8_lossy(&body).into_owned() })
}

fn more(stream: &mut BufReader<TcpStream>, body: &mut Vec<u8>, length: usize) -> Result<()> {
    let before = body.len();
    body.resize(before + length, 0);
    Ok(stream.read_exact(&mut body[before..])?)
}
