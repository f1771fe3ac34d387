//! Warm lanes allocate no memory on the packet path, from TUN device to TUN device.

#![allow(missing_docs, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use skein_ipc::keys::PrivateKey;
use skein_ipc::{
    CipherChoice, NodeSettings, OffloadSettings, PROTOCOL_VERSION, Peer, Request, Response,
    Snapshot, TunSettings, UnderlaySettings, read_frame, write_frame,
};
use skein_sys::in_new_network_namespace;
use skein_sys::{link, tun};

/// Allocations of threads whose name starts with "lane-".
static BY_LANES: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: every call is passed to the system's allocator unchanged; the count uses a static atomic
// and a buffer on the stack, and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut name = [0u8; 16];
        // SAFETY: PR_GET_NAME writes at most 16 bytes, terminator included, and `name` has 16.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        if name.starts_with(b"lane-") {
            BY_LANES.fetch_add(1, SeqCst);
        }
        // SAFETY: the caller guarantees a valid layout, as `System.alloc` requires.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller guarantees that `pointer` comes from this allocator with `layout`,
        // which passed it from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.expect("the program ip (iproute2)").success(), "ip {arguments}");
}

/// A node; its network namespace is that of the calling thread.
struct Node {
    number: u8,
    key: PrivateKey,
    other: PrivateKey,
}

impl Node {
    fn start(&self, directory: &Path) {
        let (n, other) = (self.number, 3 - self.number);
        ip("link set lo up");
        ip(&format!("address add 192.0.2.{n}/24 dev under{n}"));
        ip(&format!("link set under{n} up"));
        tun::create_persistent("skein0").unwrap();
        ip(&format!("address add 10.244.{n}.1/32 dev skein0"));
        ip("link set skein0 mtu 1440 up");
        ip(&format!("route add 10.244.{other}.0/24 dev skein0"));
        let socket = directory.join(format!("{n}.sock"));
        let listening = socket.clone();
        thread::spawn(move || skein_dataplane::run_alone(&listening, |_| Ok(())).unwrap());
        let start = Instant::now();
        let mut stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(error) => assert!(start.elapsed() < Duration::from_secs(30), "{error}"),
            }
            thread::sleep(Duration::from_millis(10));
        };
        ask(&mut stream, &Request::Hello { version: PROTOCOL_VERSION });
        ask(&mut stream, &Request::Apply { snapshot: Box::new(self.snapshot()) });
    }

    fn snapshot(&self) -> Snapshot {
        let other = 3 - self.number;
        Snapshot {
            seen_handshakes: Default::default(),
            revision: 1,
            not_before: 0,
            node: NodeSettings {
                name: format!("node-{}", self.number),
                cluster_id: "test".to_owned(),
                private_key: self.key.clone(),
                second_private_key: None,
                tun: TunSettings {
                    name: "skein0".to_owned(),
                    ifindex: link::find("skein0").unwrap().unwrap().index,
                    mtu: 1440,
                },
                underlay: UnderlaySettings {
                    addresses: vec!["0.0.0.0".parse().unwrap()],
                    port: 51900,
                    receive_buffer: 8 << 20,
                    send_buffer: 4 << 20,
                },
                lanes: 2,
                cipher: CipherChoice::Auto,
                bundling: true,
                busy_poll_us: None,
                offload: OffloadSettings::ALL,
            },
            local_cidrs: vec![format!("10.244.{}.0/24", self.number).parse().unwrap()],
            peers: vec![Peer {
                name: format!("node-{other}"),
                public_key: self.other.public().unwrap(),
                second_public_key: None,
                endpoints: vec![format!("192.0.2.{other}:51900").parse().unwrap()],
                pod_cidrs: vec![format!("10.244.{other}.0/24").parse().unwrap()],
            }],
        }
    }
}

fn ask(stream: &mut UnixStream, request: &Request) {
    write_frame(stream, request).unwrap();
    match read_frame::<Response>(stream).unwrap() {
        Some(Response::Hello { .. } | Response::Applied { .. }) => {}
        other => panic!("{other:?}"),
    }
}

/// Serves the test traffic: reads TCP connections to the end and returns UDP datagrams.
fn serve() {
    let listener = TcpListener::bind("10.244.2.1:7000").unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut buffer = vec![0; 1 << 20];
                while stream.read(&mut buffer).unwrap_or(0) > 0 {}
            });
        }
    });
    let echo = UdpSocket::bind("10.244.2.1:7000").unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            let _ = echo.send_to(&buffer[..length], from);
        }
    });
}

/// Sends bulk TCP, and small and large datagrams, some of which may be lost.
fn traffic() {
    let far: SocketAddr = "10.244.2.1:7000".parse().unwrap();
    let streams = (0..4).map(|_| {
        thread::spawn(move || {
            let mut stream = TcpStream::connect(far).unwrap();
            let block = vec![7; 256 << 10];
            (0..200).for_each(|_| stream.write_all(&block).unwrap());
        })
    });
    let streams: Vec<_> = streams.collect();
    let socket = UdpSocket::bind("10.244.1.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    socket.connect(far).unwrap();
    let mut answers = 0;
    for length in [1, 64, 700, 1400].into_iter().cycle().take(400) {
        let mut buffer = [3; 1400];
        (0..8).for_each(|_| drop(socket.send(&buffer[..length])));
        answers += (0..8).take_while(|_| socket.recv(&mut buffer).is_ok()).count();
    }
    streams.into_iter().for_each(|stream| stream.join().unwrap());
    assert!(answers > 1_000, "Only {answers} of 3200 datagrams came back.");
}

#[test]
fn warm_lanes_allocate_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let [first, second] = [(); 2].map(|()| PrivateKey::generate().unwrap());
    let a = Node { number: 1, key: first.clone(), other: second.clone() };
    let b = Node { number: 2, key: second, other: first };
    // The namespace of the second node exists in a thread of its own until the test ends.
    let (ready, is_ready): (Sender<i32>, Receiver<i32>) = channel();
    let (go, may_go) = channel::<()>();
    let (up, is_up) = channel::<()>();
    let (end, ended) = channel::<()>();
    let far_path = directory.path().to_owned();
    let far = thread::spawn(move || {
        in_new_network_namespace(move || {
            ready.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            may_go.recv().unwrap();
            b.start(&far_path);
            serve();
            up.send(()).unwrap();
            let _ = ended.recv();
        })
        .unwrap();
    });
    let namespace = is_ready.recv().unwrap();
    let path = directory.path();
    let allocated = in_new_network_namespace(move || {
        ip("link add under1 type veth peer name under2");
        ip(&format!("link set under2 netns {namespace}"));
        go.send(()).unwrap();
        is_up.recv().unwrap();
        a.start(path);
        // Buffers grow to the size of the largest batch, which takes several rounds.
        let mut counts = vec![BY_LANES.load(SeqCst)];
        while counts.len() < 12 && !counts.ends_with(&[counts[counts.len() - 1]; 3]) {
            traffic();
            counts.push(BY_LANES.load(SeqCst));
        }
        assert!(counts[0] > 0, "Lanes allocate at their start, so the count must not be 0.");
        println!("allocations: {counts:?}");
        counts[counts.len() - 1] - counts[counts.len() - 2]
    });
    drop(end);
    far.join().unwrap();
    assert_eq!(allocated.expect("a new network namespace: run the tests as root"), 0);
}
