//! Comparison of docs/wire-format.md with the code: each row of its tables is checked against the
//! bytes that the code writes.

use crate::tunnel::cookie::MacKeys;
use crate::tunnel::message::{
    CLEAR_LEN, COOKIE_REPLY_LEN, Control, CookieReply, INITIATION_PAYLOAD_LEN, Initiation,
    MIN_INITIATION_LEN, MIN_RESPONSE_LEN, RESPONSE_PAYLOAD_LEN, Response, ResponsePayload,
    Timestamp, TransportParams, initiation_clear, initiation_payload,
};
use crate::tunnel::noise::{INITIATION_OVERHEAD, RESPONSE_OVERHEAD};
use crate::wire::header::{CONTROL_LANE, HEADER_LEN, MAX_LANES};

use super::*;
use crate::tunnel::cipher::Cipher;

const DOCUMENT: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/wire-format.md"));

/// A row of a table: name, offset and size in bytes.
struct Field {
    name: &'static str,
    offset: usize,
    size: usize,
}

/// Returns the table below a heading. Its rows must follow each other without a gap.
fn table(heading: &str) -> Vec<Field> {
    let mut lines =
        DOCUMENT.lines().skip_while(|line| line.trim_start_matches('#').trim() != heading);
    assert!(lines.next().is_some(), "docs/wire-format.md must have the heading {heading:?}");
    let section = lines.take_while(|line| !line.starts_with('#'));
    let rows = section.filter(|line| line.starts_with("| ") && !line.starts_with("| offset"));
    let mut end = 0;
    let fields: Vec<_> = rows
        .map(|row| {
            let cells: Vec<_> = row.trim_matches('|').splitn(3, '|').map(str::trim).collect();
            let (offset, size) = (cells[0].parse().unwrap(), cells[1].parse().unwrap());
            assert_eq!(offset, end, "{heading}: {} must follow the row before", cells[2]);
            end = offset + size;
            Field { name: cells[2].split(':').next().unwrap(), offset, size }
        })
        .collect();
    assert!(!fields.is_empty(), "{heading}: the section must have a table");
    fields
}

fn size(fields: &[Field]) -> usize {
    fields.iter().map(|field| field.size).sum()
}

/// Compares a table with the bytes of a message: names and values in the order of the rows. A value
/// of `None` stands for bytes that have no fixed value.
fn compare(heading: &str, bytes: &[u8], expected: &[(&str, Option<u64>)]) {
    let fields = table(heading);
    let names: Vec<_> = fields.iter().map(|field| field.name).collect();
    assert_eq!(names, expected.iter().map(|(name, _)| *name).collect::<Vec<_>>(), "{heading}");
    assert_eq!(size(&fields), bytes.len(), "{heading}: the document must give the length");
    for (field, (_, value)) in fields.iter().zip(expected) {
        let Some(value) = value else { continue };
        let found = bytes[field.offset..field.offset + field.size]
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte));
        assert_eq!(found, *value, "{heading}: {} must have the documented place", field.name);
    }
}

const PARAMS: TransportParams =
    TransportParams { lanes: 61, ciphers: ALL_CIPHERS, mtu: 1439, ecn: true };

/// Byte of [`ALL_CIPHERS`]: AES-256-GCM, ChaCha20-Poly1305, AES in hardware.
const CIPHERS_BYTE: u64 = 0x83;

#[test]
fn documented_header_matches_code() {
    let (lane, receiver, counter) = (63, 0x0102_0304, 0x0506_0708_090a_0b0c);
    let flags = Flags::PARTIAL_CHECKSUM;
    let header = Header { kind: MessageType::Data, flags, lane, receiver, counter };
    compare(
        "Header",
        &header.to_bytes(),
        &[
            ("type", Some(4)),
            ("flags", Some(1)),
            ("lane", Some(lane.into())),
            ("reserved", Some(0)),
            ("receiver index", Some(receiver.into())),
            ("counter", Some(counter)),
        ],
    );
    let kinds = [
        (MessageType::Initiation, "1 handshake initiation"),
        (MessageType::Response, "2 handshake response"),
        (MessageType::CookieReply, "3 cookie reply"),
        (MessageType::Data, "4 data"),
        (MessageType::Control, "5 control"),
    ];
    for (index, (kind, text)) in kinds.into_iter().enumerate() {
        assert_eq!(kind as usize, index + 1);
        assert!(DOCUMENT.contains(text), "the document must list {text:?}");
    }
    assert_eq!((usize::from(CONTROL_LANE), MAX_LANES), (0xff, 64));
}

#[test]
fn documented_control_messages_match_code() {
    let ping = Control::Ping { id: 11, sent: 12, silent: 13 };
    let fields = [("type", Some(1)), ("id", Some(11)), ("sent", Some(12)), ("silent", Some(13))];
    compare("Ping", &ping.to_bytes(), &fields);
    let pong = Control::Pong { id: 11, sent: 12 };
    compare("Pong", &pong.to_bytes(), &[("type", Some(2)), ("id", Some(11)), ("sent", Some(12))]);
}

#[test]
fn documented_payloads_match_code() {
    let timestamp = Timestamp::new(Duration::new(1_700_000_000, 5));
    let features = Some(1);
    compare(
        "Initiation payload",
        &initiation_payload(timestamp, PARAMS),
        &[
            ("seconds", Some(1_700_000_000)),
            ("nanoseconds", Some(5)),
            ("lanes", Some(61)),
            ("ciphers", Some(CIPHERS_BYTE)),
            ("MTU", Some(1439)),
            ("features", features),
        ],
    );
    let response = ResponsePayload { index: 17, params: PARAMS, cipher: Cipher::ChaCha20Poly1305 };
    compare(
        "Response payload",
        &response.to_bytes(),
        &[
            ("index", Some(17)),
            ("lanes", Some(61)),
            ("ciphers", Some(CIPHERS_BYTE)),
            ("cipher", Some(2)),
            ("features", features),
            ("MTU", Some(1439)),
        ],
    );
}

#[test]
fn documented_handshake_messages_match_code() {
    let mut lab = Lab::new(2);
    let (now, id) = (lab.now, lab.peer_id(0, 1));
    let (first, second) = (lab.key(0), lab.key(1));
    lab.nodes[0].engine.request_session(now, id);
    let initiation = lab.nodes[0].engine.poll_transmit().unwrap().payload;

    let header = Header::parse(&initiation).unwrap();
    let message = Initiation::parse(header, &initiation).unwrap();
    compare(
        "Initiation",
        &initiation,
        &[
            ("header", None),
            ("sender index", Some(message.sender.into())),
            ("listening port", Some(PORT.into())),
            ("reserved", Some(0)),
            ("ephemeral", None),
            ("static", None),
            ("payload", None),
            ("mac1", None),
            ("mac2", Some(0)),
        ],
    );
    let fields = table("Initiation");
    assert_eq!(size(&fields[..4]), CLEAR_LEN);
    assert_eq!(size(&fields[4..7]), INITIATION_OVERHEAD + INITIATION_PAYLOAD_LEN);
    assert_eq!(size(&fields), MIN_INITIATION_LEN + 1, "earlier versions send no features");
    assert_eq!(initiation[..CLEAR_LEN], initiation_clear(message.sender, PORT));
    let mac1 = fields[7].offset;
    assert_eq!(initiation[mac1..mac1 + 16], MacKeys::new(&second).mac1(&initiation[..mac1]));

    let source = lab.nodes[0].config.addresses[0];
    lab.nodes[1].engine.handle_datagram(now, source, &mut initiation.clone());
    let response = lab.nodes[1].engine.poll_transmit().unwrap().payload;
    let header = Header::parse(&response).unwrap();
    assert!(Response::parse(header, &response).is_ok());
    assert_eq!(header.receiver, message.sender);
    let names = [("header", None), ("ephemeral", None), ("payload", None), ("mac1", None)];
    compare("Response", &response, &names);
    let fields = table("Response");
    assert_eq!(size(&fields[1..3]), RESPONSE_OVERHEAD + RESPONSE_PAYLOAD_LEN);
    assert_eq!(size(&fields), MIN_RESPONSE_LEN);
    let mac1 = fields[3].offset;
    assert_eq!(response[mac1..], MacKeys::new(&first).mac1(&response[..mac1]));

    let reply = CookieReply { salt: [7; 32], sealed: [9; 32] }.to_bytes(message.sender);
    compare("Cookie reply", &reply, &[("header", None), ("salt", None), ("cookie", None)]);
    assert_eq!((reply.len(), reply[HEADER_LEN], reply[48]), (COOKIE_REPLY_LEN, 7, 9));
}
