//! The network `outgoing`, with network namespaces as the outside.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/outside.rs"]
mod outside;
mod support;

use machinefs_backends::{Adopted, Backend, MachineSpec, Network};
use outside::{CLOSED, GATEWAY, HOST, INTERNET, NAMES, NEIGHBOUR, Outside};
use std::fs;
use std::process::Command;
use support::{Rig, leftovers};

/// Runs the tests below on the host of that world.
#[test]
fn on_a_host_of_network_namespaces() {
    need!(root);
    if let Some(reason) = Outside::missing() {
        println!("skipped: {reason}");
        return;
    }
    let world = Outside::new();
    let program = std::env::current_exe().unwrap();
    let mut command = world.on_host(program.to_str().unwrap());
    command.args(["--ignored", "--test-threads=1", "--nocapture", "--skip", "victim"]);
    let status = command.env("MFS_TEST_NEIGHBOUR", world.neighbour()).status().unwrap();
    assert!(status.success());
}

fn is_inside() -> bool {
    std::env::var_os("MFS_TEST_NEIGHBOUR").is_some()
}

fn rig() -> Rig {
    let rig = Rig::new();
    fs::write(rig.dir.path().join("resolv.conf"), format!("nameserver {NAMES}\n")).unwrap();
    rig
}

fn outgoing(rig: &Rig) -> MachineSpec {
    MachineSpec { network: Network::Outgoing, ..rig.spec("host") }
}

/// What a server there says to the machine; empty when it is not reached.
async fn hear(rig: &Rig, spec: &MachineSpec, address: &str) -> String {
    let python =
        format!("import socket; print(socket.create_connection(('{address}', 80), 3).recv(99).decode(), end='')");
    let (output, code) = rig.run(spec, &format!("python3 -c \"{python}\" 2>/dev/null")).await;
    if code == 0 { output } else { String::new() }
}

fn ruleset() -> String {
    let output =
        Command::new("nft").args(["list", "ruleset"]).env("PATH", "/usr/sbin:/sbin:/usr/bin").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn setting(key: &str) -> String {
    fs::read_to_string(format!("/proc/sys/net/ipv4/{key}")).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by on_a_host_of_network_namespaces"]
async fn reaches_out_and_nothing_near() {
    if !is_inside() {
        return;
    }
    let rig = rig();
    let (one, two) = (outgoing(&rig), outgoing(&rig));
    assert_eq!((ruleset(), setting("conf/up0/forwarding")), (String::new(), "0".into()));
    let (running, _) = tokio::join!(rig.boot(&one), rig.boot(&two));
    println!("{:?} {:?}", running.facts, running.warnings);
    let fact = |running: &machinefs_backends::Running, key: &str| {
        running.facts.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone()).unwrap_or_default()
    };
    assert_eq!(fact(&running, "network"), "outgoing (IPv4)");
    assert_eq!(hear(&rig, &one, INTERNET).await, format!("net to {}\n", HOST[0]), "masqueraded as the host");
    assert_eq!(hear(&rig, &two, INTERNET).await, format!("net to {}\n", HOST[0]));
    // Names, by the resolver of the C library, and by TCP.
    assert_eq!(rig.ok(&one, "getent ahostsv4 some.name.example | head -1 | cut -d' ' -f1").await, "203.0.113.10\n");
    assert_eq!(hear(&rig, &one, "some.name.example").await, format!("net to {}\n", HOST[0]));
    let tcp = "RES_OPTIONS=use-vc getent ahostsv4 other.example | head -1 | cut -d' ' -f1";
    assert_eq!(rig.ok(&one, tcp).await, "203.0.113.10\n");
    let ping = rig.run(&one, &format!("command -v ping >/dev/null || exit 99; ping -c 1 -W 3 {INTERNET}")).await;
    assert!(ping.1 == 0 || ping.1 == 99, "{ping:?}");

    let address = fact(&running, "address");
    let gateway = rig.ok(&one, "awk '$2 == \"00000000\" {print $3}' /proc/net/route").await;
    let bytes = u32::from_str_radix(gateway.trim(), 16).unwrap().to_le_bytes();
    let inner_gateway = std::net::Ipv4Addr::from(bytes).to_string();
    // The second machine listens, so that silence means that it is not reached.
    let listen = "nohup python3 -c \"import socket\ns=socket.create_server(('0.0.0.0', 80))\n\
        while 1: c=s.accept()[0]; c.sendall(b'machine'); c.close()\" >/dev/null 2>&1 &";
    rig.ok(&two, listen).await;
    let second = rig.backend.adopt(&two).await.unwrap();
    let Adopted::Running(second) = second else { panic!("it runs") };
    let second = fact(&second, "address");
    assert_ne!(address, second);
    support::eventually("the second machine's server", || {
        let there = format!("(exec 3<>/dev/tcp/{second}/80)");
        Command::new("bash").args(["-c", &there]).stderr(std::process::Stdio::null()).status().unwrap().success()
    });
    let near = HOST.iter().chain(&CLOSED).chain(&[GATEWAY, NEIGHBOUR, NAMES]).copied();
    for closed in near.chain([inner_gateway.as_str(), second.as_str()]) {
        assert_eq!(hear(&rig, &one, closed).await, "", "{closed} is closed to machines");
    }
    for closed in [INTERNET, NEIGHBOUR, CLOSED[0], CLOSED[1], CLOSED[2], GATEWAY] {
        let there = format!("(exec 3<>/dev/tcp/{closed}/80)");
        assert!(Command::new("bash").args(["-c", &there]).status().unwrap().success(), "{closed} is there");
    }
    // UDP to the host and to name servers is closed too; so is IPv6.
    let udp = format!(
        "python3 -c \"import socket; s=socket.socket(2,2); s.settimeout(1); \
        s.sendto(b'\\x12\\x34\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0\\x01x\\0\\0\\x01\\0\\x01', ('{NAMES}', 53)); s.recv(99)\" 2>/dev/null"
    );
    assert_ne!(rig.run(&one, &udp).await.1, 0);
    assert_eq!(rig.ok(&one, "grep -c eth0 /proc/net/if_inet6 || true").await, "0\n");

    // Nobody comes in by way of the host, who would route it.
    let neighbour = std::env::var("MFS_TEST_NEIGHBOUR").unwrap();
    let from = |address: &str| {
        let there = format!("(exec 3<>/dev/tcp/{address}/80)");
        let net = format!("--net=/run/netns/{neighbour}");
        let mut command = Command::new("timeout");
        command.args(["2", "nsenter", &net, "bash", "-c", &there]).stderr(std::process::Stdio::null());
        command.status().unwrap().success()
    };
    assert!(from(HOST[1]), "the neighbour reaches the host");
    assert!(!from(&second), "and no machine");
    assert!(!from(INTERNET), "and the host did not become a router for it");

    // A new daemon goes on with names; a stopped machine has nothing.
    let fresh = rig.reopened();
    drop(fresh.adopt(&one).await.unwrap());
    assert_eq!(rig.ok(&one, "getent ahostsv4 third.example | head -1 | cut -d' ' -f1").await, "203.0.113.10\n");
    rig.backend.kill(&two).await.unwrap();
    assert!(!leftovers(&two).iter().any(|l| l.starts_with("interface")));
    assert_eq!(hear(&rig, &one, INTERNET).await, format!("net to {}\n", HOST[0]), "the other goes on");
    rig.backend.start(&two).await.unwrap();
    assert_eq!(hear(&rig, &two, INTERNET).await, format!("net to {}\n", HOST[0]));

    // None is none, and the machine's own resolv.conf is left alone.
    rig.backend.kill(&two).await.unwrap();
    let none = MachineSpec { network: Network::None, ..two.clone() };
    rig.backend.start(&none).await.unwrap();
    assert_eq!(rig.ok(&none, "ls /sys/class/net").await, "lo\n");
    assert_eq!(hear(&rig, &none, INTERNET).await, "");
    rig.ok(&none, "echo nameserver 127.0.0.53 > /etc/resolv.conf; echo '# mine' >> /etc/resolv.conf").await;
    rig.backend.kill(&none).await.unwrap();
    rig.backend.start(&two).await.unwrap();
    assert!(rig.ok(&two, "cat /etc/resolv.conf").await.ends_with("# mine\n"));
    rig.finish().await;
    assert_eq!((ruleset(), setting("conf/up0/forwarding")), (String::new(), "0".into()), "nothing is left");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by on_a_host_of_network_namespaces"]
async fn a_range_that_the_host_comes_to_use_is_left() {
    if !is_inside() {
        return;
    }
    let rig = rig();
    let spec = outgoing(&rig);
    let address = |running: machinefs_backends::Running| {
        running.facts.into_iter().find(|(k, _)| k == "address").map(|(_, v)| v).unwrap()
    };
    let first = address(rig.boot(&spec).await);
    rig.backend.kill(&spec).await.unwrap();
    let ip = |word: &str| {
        let status = Command::new("ip").args(["route", word, &format!("{first}/32"), "via", GATEWAY]).status();
        assert!(status.unwrap().success());
    };
    ip("add");
    let second = address(rig.backend.start(&spec).await.unwrap());
    ip("del");
    assert_ne!(first, second);
    assert_eq!(hear(&rig, &spec, INTERNET).await, format!("net to {}\n", HOST[0]));
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by on_a_host_of_network_namespaces"]
async fn how_long_a_network_takes() {
    if !is_inside() {
        return;
    }
    let rig = rig();
    for network in [Network::None, Network::Outgoing] {
        let mut times = Vec::new();
        for _ in 0..15 {
            let spec = MachineSpec { network, ..rig.spec("host") };
            rig.backend.create(&spec, std::sync::Arc::new(|_| {})).await.unwrap();
            let begin = std::time::Instant::now();
            rig.backend.start(&spec).await.unwrap();
            times.push(begin.elapsed());
            rig.backend.destroy(&spec).await.unwrap();
        }
        times.sort();
        println!("start with {network:?}: least {:?}, median {:?}", times[0], times[times.len() / 2]);
    }
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "the daemon that dies in killed_in_any_step_with_a_network"]
async fn victim() {
    support::victim().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by on_a_host_of_network_namespaces"]
async fn killed_in_any_step_with_a_network() {
    if !is_inside() {
        return;
    }
    let rig = rig();
    support::kill_victims(&rig, 40, |spec| spec.network = Network::Outgoing).await;
    rig.finish().await;
    assert_eq!((ruleset(), setting("conf/up0/forwarding")), (String::new(), "0".into()), "nothing is left");
}
