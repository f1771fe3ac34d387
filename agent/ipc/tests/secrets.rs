//! Tests that no freed heap block contains a private key.

#![allow(missing_docs, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use skein_core::tunnel::{Ciphers, EngineConfig};
use skein_ipc::keys::PrivateKey;
use skein_ipc::{Request, Snapshot, encode_frame, read_frame};

/// A private key in text form; [`BYTES`] are its bytes.
const TEXT: &str = "yIBdwOu3mNnUKZPRhiWr6rzEkBwxOpmwLUHzBRbTD2s=";
const BYTES: [u8; 32] = [
    200, 128, 93, 192, 235, 183, 152, 217, 212, 41, 147, 209, 134, 37, 171, 234, 188, 196, 144, 28,
    49, 58, 153, 176, 45, 65, 243, 5, 22, 211, 15, 107,
];

thread_local! {
    static LEAKS: Cell<u64> = const { Cell::new(0) };
    static SEARCHES: Cell<bool> = const { Cell::new(false) };
}

/// An allocator that searches freed blocks for the key, in threads that enabled `SEARCHES`.
struct Searching;

/// Counts the block as a leak if it contains the first half of the key in either form.
///
/// # Safety
/// `pointer` must point to a live, initialised block of `length` bytes.
unsafe fn search(pointer: *const u8, length: usize) {
    // SAFETY: the caller passes a live, initialised block of `length` bytes.
    let block = unsafe { std::slice::from_raw_parts(pointer, length) };
    let holds = |secret: &[u8]| block.windows(16).any(|window| window == &secret[..16]);
    if holds(TEXT.as_bytes()) || holds(&BYTES) {
        LEAKS.with(|leaks| leaks.set(leaks.get() + 1));
    }
}

// SAFETY: every call is passed to the system allocator. A search reads only the block that is being
// freed, and accesses only thread-locals with a constant initialiser, which do not allocate.
unsafe impl GlobalAlloc for Searching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Zeroed memory is initialised, and contains no key of an earlier block.
        // SAFETY: the caller of `alloc` passes a layout of non-zero size, as `alloc_zeroed`
        // requires.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if SEARCHES.with(Cell::get) {
            // SAFETY: the block is live until `System.dealloc`, and `alloc` initialised it.
            unsafe { search(pointer, layout.size()) };
        }
        // SAFETY: the block comes from `System.alloc_zeroed` with the same layout.
        unsafe { System.dealloc(pointer, layout) }
    }
    // The default `realloc` allocates, copies and frees, so that `dealloc` searches the old block.
}

#[global_allocator]
static SEARCHING: Searching = Searching;

/// Runs `work` and returns the number of freed blocks that contained the key.
fn leaks(work: impl FnOnce()) -> u64 {
    LEAKS.with(|leaks| leaks.set(0));
    SEARCHES.with(|searches| searches.set(true));
    work();
    SEARCHES.with(|searches| searches.set(false));
    LEAKS.with(Cell::get)
}

/// Returns a request with a snapshot of `peers` peers.
fn request(peers: u16) -> Request {
    let peer = |n: u16| {
        serde_json::json!({
            "name": format!("node-{n}"),
            "public_key": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
            "endpoints": ["192.0.2.2:51900"],
            "pod_cidrs": ["10.2.0.0/24", "fd00:2::/64"],
        })
    };
    let snapshot = serde_json::json!({
        "revision": 1,
        "node": {
            "name": "node-a",
            "cluster_id": "default",
            "private_key": TEXT,
            "tun": { "name": "skein0", "ifindex": 7, "mtu": 1440 },
            "underlay": {
                "addresses": ["0.0.0.0"], "port": 51900,
                "receive_buffer": 65536, "send_buffer": 65536,
            },
            "lanes": 2,
            "cipher": "auto",
            "bundling": true,
            "busy_poll_us": null,
            "offload": {
                "tun_uso": true, "tun_tso": true, "tun_checksum": true,
                "udp_gso": true, "udp_gro": true,
            },
        },
        "local_cidrs": [],
        "peers": (0..peers).map(peer).collect::<Vec<_>>(),
    });
    let snapshot = serde_json::from_value::<Snapshot>(snapshot).unwrap();
    Request::Apply { snapshot: Box::new(snapshot) }
}

#[test]
fn search_finds_blocks_that_are_not_wiped() {
    let (text, bytes) = (TEXT.to_owned(), BYTES.to_vec());
    assert_eq!(leaks(move || drop(text)), 1);
    assert_eq!(leaks(move || drop(bytes)), 1);
    assert_eq!(leaks(|| drop(vec![0; 100])), 0);
    let mut grows = String::with_capacity(TEXT.len());
    grows.push_str(TEXT);
    assert_eq!(leaks(move || grows.push('x')), 2, "the outgrown block and the current one");
}

#[test]
fn key_is_parsed_and_formatted_without_a_leak() {
    let written = leaks(|| {
        let key: PrivateKey = TEXT.parse().unwrap();
        let mut line = key.clone().to_base64();
        line.push('\n');
    });
    assert_eq!(written, 0);
    let mut wrong = TEXT[..TEXT.len() - 1].to_owned();
    wrong.push('?');
    let refused = leaks(|| assert!(wrong.parse::<PrivateKey>().is_err()));
    assert_eq!(refused, 0, "the decoded part of a malformed text is wiped");
}

#[test]
fn debug_output_does_not_contain_the_key() {
    let key: PrivateKey = TEXT.parse().unwrap();
    let config = EngineConfig {
        private_key: skein_core::PrivateKey::new(key.as_bytes()),
        cluster_id: "default".to_owned(),
        listen_port: 51900,
        lanes: 1,
        ciphers: Ciphers { aes256_gcm: true, chacha20_poly1305: true, aes_hardware: true },
        mtu: 1440,
        ecn: false,
    };
    let shown = format!("{key:?} {config:?} {:?} {:#?}", request(1), request(1));
    let hex: String = BYTES.iter().map(|byte| format!("{byte:02x}")).collect();
    let list = BYTES.map(|byte| byte.to_string())[..8].join(", ");
    let lines = BYTES.map(|byte| byte.to_string())[..8].join(",\n");
    let shown = shown.replace(' ', "").to_lowercase();
    for secret in [&TEXT[..16], &hex[..16], &list, &lines] {
        assert!(!shown.contains(&secret.replace(' ', "").to_lowercase()), "{shown}");
    }
}

#[test]
fn snapshot_is_encoded_and_decoded_without_a_leak() {
    // Without peers, the frame fits the first read buffer; with 1,000 peers, the buffer grows.
    for (peers, at_least) in [(0, 0), (1000, 140_000)] {
        let request = request(peers);
        let leaked = leaks(|| {
            let mut frames = Vec::new();
            for _ in 0..2 {
                frames.push(encode_frame(&request).unwrap());
            }
            assert!(frames[0].len() > at_least);
            let read = read_frame::<Request>(&mut &frames[0][..]).unwrap();
            let Some(Request::Apply { snapshot }) = read else {
                panic!("the frame decodes to another request")
            };
            assert!(snapshot.node.private_key.as_bytes() == &BYTES);
        });
        assert_eq!(leaked, 0, "with {peers} peers");
        assert_eq!(leaks(move || drop(request)), 0, "the snapshot wipes its key on drop");
    }
}
