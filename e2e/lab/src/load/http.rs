//! A minimal HTTP/1.1 client for the agent's pages and for WebDriver.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};

/// The response of an HTTP server.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code, such as 200.
    pub status: u16,
    /// Body as text; bytes that are not UTF-8 are replaced.
    pub body: String,
}

/// Sends a GET request.
///
/// # Errors
/// Those of [`send`], with a limit of 5 s.
pub fn get(server: SocketAddr, path: &str) -> Result<Answer> {
    send(server, "GET", path, None, Duration::from_secs(5))
}

/// Sends one request over a new connection, with a JSON body or none. `limit` bounds the connection
/// setup and each read or write.
///
/// # Errors
/// If the server does not accept the connection or answer within `limit`, or if the answer is not
/// HTTP.
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

/// Reads a response. Its body ends after Content-Length bytes, after the last chunk, or at the end
/// of the connection.
fn read(stream: &mut BufReader<TcpStream>) -> Result<Answer> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.context("the response is not HTTP")?;
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
        Some(length) => read_exactly(stream, &mut body, length)?,
        // The length of a chunk precedes it (RFC 9112, section 7.1).
        None if chunked => loop {
            line.clear();
            stream.read_line(&mut line)?;
            match usize::from_str_radix(line.trim(), 16).context("length of a chunk")? {
                0 => break,
                length => read_exactly(stream, &mut body, length)?,
            }
            stream.read_line(&mut line)?;
        },
        None => drop(stream.read_to_end(&mut body)?),
    }
    Ok(Answer { status, body: String::from_utf8_lossy(&body).into_owned() })
}

fn read_exactly(
    stream: &mut BufReader<TcpStream>,
    body: &mut Vec<u8>,
    length: usize,
) -> Result<()> {
    let before = body.len();
    body.resize(before + length, 0);
    Ok(stream.read_exact(&mut body[before..])?)
}
