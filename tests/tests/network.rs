//! `config/network`: what of the network a machine reaches.

use machinefs_tests::each_user;
use std::net::{TcpListener, UdpSocket};

/// An address of this host, as others see it; nothing is sent.
fn own_address() -> String {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let outside = socket.connect("192.0.2.1:9").and_then(|()| socket.local_addr());
    outside.map_or("127.0.0.2".into(), |address| address.ip().to_string())
}

each_user! {
    /// A machine reaches out by default, where this host can give it a network, and says so where it cannot; `none` is
    /// loopback only. A change waits for the next start.
    fn outgoing_and_none(d) {
        let m = d.running("net");
        let interfaces = "ls /sys/class/net | tr '\\n' ' '";
        assert_eq!(m.read("config/network"), "default\n");
        if m.info("network").starts_with("outgoing") {
            assert_ne!(m.guest(interfaces), "lo ");
            assert_eq!(m.guest("grep -c ^nameserver /etc/resolv.conf"), "1");
            // What listens on the host is not reached.
            let listener = TcpListener::bind("0.0.0.0:0").expect("a port");
            listener.set_nonblocking(true).expect("a socket");
            let port = listener.local_addr().expect("an address").port();
            let name_server = m.guest("sed -n 's/^nameserver //p' /etc/resolv.conf");
            for address in ["127.0.0.1".into(), name_server, own_address()] {
                m.run(&format!("timeout 2 bash -c 'exec 3<> /dev/tcp/{address}/{port}' 2> /dev/null"));
                let reached = listener.accept();
                assert!(reached.is_err(), "the host was reached by {address}: {reached:?}");
            }
            assert!(!m.read("info").contains("warning it has no network"));
        } else {
            println!("skipped: no network for machines of this user here");
            assert_eq!(m.guest(interfaces), "lo ");
            assert!(m.read("info").contains("warning it has no network"), "{}", m.read("info"));
            assert!(m.read("errors").contains("it has no network"), "{}", m.read("errors"));
        }
        m.bash("echo none > $D/config/network").ok();
        assert_eq!(m.info("pending"), "network none");
        m.ctl("restart").ok();
        m.bash("cat $D/wait/running").ok();
        m.until_running();
        assert_eq!(m.guest(interfaces), "lo ");
        assert_eq!(m.info("network"), "none");
        m.bash("echo everything > $D/config/network").fails_with("Invalid argument");
    }
}

each_user! {
    /// `disk` bounds what a machine writes, where this host can; where not, the machine says so.
    fn a_disk_has_an_end(d) {
        let m = d.create("disk", "disk=64M");
        m.until_running();
        let (_, code) = m.run("head -c 200M /dev/zero > /root/big 2> /dev/null; test $(stat -c %s /root/big) -lt 100000000");
        let said = m.read("info").contains("warning the limit disk=");
        assert_eq!(code != 0, said, "{}", m.read("info"));
        if said {
            println!("skipped: no limit of disks for machines of this user here");
        }
        m.bash("rm -f $D/files/root/big").ok();
        // The space is free when our kernel has let go of the file, which is soon, not at once.
        m.guest("for i in $(seq 50); do echo small > /root/small && break; sleep 0.1; done 2> /dev/null; cat /root/small");
    }
}
