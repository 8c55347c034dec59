//! A device that is passed through to a micro-VM and moved with it between two lab hosts: the kernel's mtty, a serial
//! card whose registers and FIFO are all that it knows.
//!
//! The guest fills the FIFO, sets line control and divisor, and leaves them. After the move, or after one that failed, it
//! is told to read them back, and tells what it found.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use vmferry_guest::kvm::{MicroVmControl, MicroVmPhase};
use vmferry_rig::lab::{Host, Place};
use vmferry_tests::card::Card;
use vmferry_tests::command::{Done, Running, program, send};

const PLAIN: [&str; 1] = ["--insecure-plaintext"];
/// The lab's blackouts are emulated ones.
const PATIENT: [&str; 2] = ["--downtime-limit", "20s"];
/// Emulated twice, the guest is slow.
const GUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Where the micro-VM puts the card's first port.
const CARD: u16 = 0xc000;
const CONSOLE: u16 = 0x3f8;
const LOW: u16 = 0;
const HIGH: u16 = 1;
const FIFO_CONTROL: u16 = 2;
const LINE_CONTROL: u16 = 3;
const LINE_STATUS: u16 = 5;
/// The word that the guest leaves in the FIFO, and then what it sets.
const WORD: &[u8] = b"ferry";
const DIVISOR: u16 = 0x3039;
/// Eight bits, even parity; with the divisor's latch open it is 0x9b.
const LINE: u8 = 0x1b;
const LATCH: u8 = 0x80;

/// A guest as code, put together instruction by instruction.
struct Code(Vec<u8>);

impl Code {
    fn port(&mut self, port: u16) -> &mut Self {
        self.0.extend([0x66, 0xba]); // mov dx, port
        self.0.extend(port.to_le_bytes());
        self
    }

    fn set(&mut self, port: u16, value: u8) -> &mut Self {
        self.port(port).0.extend([0xb0, value, 0xee]); // mov al, value; out dx, al
        self
    }

    fn tell(&mut self, value: u8) -> &mut Self {
        self.0.extend([0xb0, value, 0xe6, 0xe9]); // mov al, value; out 0xe9, al
        self
    }

    fn tell_register(&mut self, port: u16) -> &mut Self {
        self.port(port).0.extend([0xec, 0xe6, 0xe9]); // in al, dx; out 0xe9, al
        self
    }

    /// Sets the card up, says `S`, waits for a byte on the console, tells the registers and the FIFO, says `E`, waits.
    fn guest() -> Vec<u8> {
        let mut code = Code(Vec::new());
        code.set(CARD + FIFO_CONTROL, 1).set(CARD + LINE_CONTROL, LINE);
        for byte in WORD {
            code.set(CARD + LOW, *byte);
        }
        let [low, high] = DIVISOR.to_le_bytes();
        code.set(CARD + LINE_CONTROL, LINE | LATCH).set(CARD + LOW, low).set(CARD + HIGH, high).tell(b'S');
        let wait = code.0.len();
        code.0.extend([0xff, 0x05, 0x00, 0x30, 0x00, 0x00]); // inc dword [0x3000]
        code.port(CONSOLE + LINE_STATUS).0.extend([0xec, 0xa8, 0x01]); // in al, dx; test al, 1
        let back = u8::try_from(256 + wait - (code.0.len() + 2)).unwrap();
        code.0.extend([0x74, back]); // jz wait
        code.port(CONSOLE).0.push(0xec); // in al, dx
        code.tell_register(CARD + LOW).tell_register(CARD + HIGH).tell_register(CARD + LINE_CONTROL);
        code.set(CARD + LINE_CONTROL, LINE);
        for _ in WORD {
            code.tell_register(CARD + LOW);
        }
        code.tell(b'E');
        let back = i32::try_from(wait).unwrap() - i32::try_from(code.0.len() + 5).unwrap();
        code.0.push(0xe9); // jmp wait
        code.0.extend(back.to_le_bytes());
        code.0
    }

    /// What it tells when nothing was lost.
    fn answer() -> Vec<u8> {
        [&DIVISOR.to_le_bytes()[..], &[LINE | LATCH], WORD, b"E"].concat()
    }
}

/// A micro-VM's process. Dropped, it ends; the card after it.
struct MicroVm {
    child: Child,
    name: String,
    beat: UnixStream,
    console: UnixStream,
    _folder: tempfile::TempDir,
    _card: Card,
}

impl MicroVm {
    /// Runs the guest, and waits until it has set the card up.
    fn run(name: &str, card: Card) -> MicroVm {
        let mut vm = MicroVm::start(name, card, true);
        assert_eq!(vm.hear(1), b"S");
        vm
    }

    fn incoming(name: &str, card: Card) -> MicroVm {
        MicroVm::start(name, card, false)
    }

    fn start(name: &str, card: Card, boots: bool) -> MicroVm {
        let folder = tempfile::tempdir().unwrap();
        let listen = |what: &str| {
            let path = folder.path().join(what);
            (UnixListener::bind(&path).unwrap(), format!("unix:{}", path.display()))
        };
        let ((beat, beat_route), (console, console_route)) = (listen("beat"), listen("console"));
        let code: PathBuf = folder.path().join("code");
        fs::write(&code, Code::guest()).unwrap();
        let mut command = Command::new(program());
        command.args(["microvm", "--name", name, "--ram", "4MiB", "--vfio", &card.words()]);
        command.args(["--beat", &beat_route, "--console", &console_route]);
        if boots {
            command.arg("--flat").arg(code)
        } else {
            command.arg("--incoming")
        };
        let mut child = command.stdin(Stdio::null()).spawn().unwrap();
        let (console, beat) = (accept(&console, &mut child), accept(&beat, &mut child));
        let vm = MicroVm { child, name: name.to_owned(), beat, console, _folder: folder, _card: card };
        vm.wait_phase(if boots { MicroVmPhase::Running } else { MicroVmPhase::Waiting });
        vm
    }

    fn spec(&self) -> String {
        format!("kvm:{}", self.name)
    }

    fn wait_phase(&self, phase: MicroVmPhase) {
        let mut left = GUEST_TIMEOUT;
        loop {
            let now = MicroVmControl::connect(&self.name).and_then(|mut control| control.status());
            if now.as_ref().is_ok_and(|status| status.phase == phase) {
                return;
            }
            left = left
                .checked_sub(Duration::from_millis(20))
                .unwrap_or_else(|| panic!("{now:?}, not {phase:?}"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn hear(&mut self, count: usize) -> Vec<u8> {
        let mut heard = vec![0; count];
        self.beat.read_exact(&mut heard).unwrap();
        heard
    }

    /// Tells the guest to read its card, and judges what it found.
    fn assert_card_is_whole(&mut self) {
        self.wait_phase(MicroVmPhase::Running);
        self.console.write_all(b"?").unwrap();
        let answer = Code::answer();
        let heard = self.hear(answer.len());
        println!("lab: the guest reads {heard:02x?}");
        assert_eq!(heard, answer);
    }
}

impl Drop for MicroVm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The micro-VM's end of a route, once it has come.
fn accept(listener: &UnixListener, child: &mut Child) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let stream = loop {
        if let Ok((stream, _)) = listener.accept() {
            break stream;
        }
        assert!(child.try_wait().unwrap().is_none(), "the micro-VM did not start");
        std::thread::sleep(Duration::from_millis(10));
    };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(GUEST_TIMEOUT)).unwrap();
    stream
}

/// Starts `vmferry receive` and tells the other host where.
fn receive(place: &Place, vm: &MicroVm) -> Running {
    let listen = format!("tcp://{}:0", place.address);
    let spec = vm.spec();
    let words = ["receive", "--listen", &listen, "--guest", &spec, "--json", PLAIN[0]];
    let mut running = Running::start(&words, "");
    let line = running.wait_line("waiting for a guest on");
    place.meet("the receiver listens", line.split(' ').next_back().unwrap_or_default()).unwrap();
    running
}

fn start_send(place: &Place, vm: &MicroVm, more: &[&str], hold: &str) -> Running {
    let address = place.meet("the receiver listens", "").unwrap();
    send(&vm.spec(), &address, &[&PLAIN[..], &PATIENT, more].concat(), hold)
}

fn ended(place: &Place) {
    place.meet("all was looked at", "").unwrap();
}

#[test]
fn a_serial_card_moves_with_its_guest() {
    let place = Place::find().unwrap();
    match place.host {
        Host::A => {
            let vm = MicroVm::run("card-a", Card::make(1, "mtty-2"));
            let sent: Done = start_send(&place, &vm, &["--verify"], "").done();
            assert_eq!(sent.code(), 0, "{}", sent.stderr);
            assert_eq!(sent.report["status"], "completed", "{}", sent.report);
            let device = &sent.report["devices"][0];
            println!("lab: {device}");
            assert_eq!(device["name"], "mtty0", "{}", sent.report);
            ended(&place);
        }
        Host::B => {
            let mut vm = MicroVm::incoming("card-b", Card::make(1, "mtty-2"));
            let received = receive(&place, &vm).done();
            assert_eq!(received.code(), 0, "{}", received.stderr);
            vm.assert_card_is_whole();
            ended(&place);
        }
    }
}

#[test]
fn a_target_with_another_card_refuses_and_the_source_keeps_its_own() {
    let place = Place::find().unwrap();
    match place.host {
        Host::A => {
            let mut vm = MicroVm::run("other-a", Card::make(2, "mtty-2"));
            let sent = start_send(&place, &vm, &[], "").done();
            assert_eq!(sent.code(), 78, "{}", sent.stderr);
            assert!(sent.sentence().contains("mtty0"), "{}", sent.stderr);
            vm.assert_card_is_whole();
            ended(&place);
        }
        Host::B => {
            let vm = MicroVm::incoming("other-b", Card::make(2, "mtty-1"));
            let receiving = receive(&place, &vm);
            ended(&place);
            receiving.signal(Signal::SIGINT);
            assert_eq!(receiving.done().code(), 130);
        }
    }
}

#[test]
fn a_sender_killed_in_the_blackout_leaves_a_card_that_works_and_moves_the_next_time() {
    let place = Place::find().unwrap();
    match place.host {
        Host::A => {
            let vm = MicroVm::run("killed-a", Card::make(3, "mtty-2"));
            let mut sending = start_send(&place, &vm, &[], "send:last-round:20000");
            sending.wait_line("holding at last-round");
            vm.wait_phase(MicroVmPhase::Paused);
            sending.signal(Signal::SIGKILL);
            drop(sending);
            vm.wait_phase(MicroVmPhase::Running);
            let sent = start_send(&place, &vm, &[], "").done();
            assert_eq!(sent.code(), 0, "{}", sent.stderr);
            ended(&place);
        }
        Host::B => {
            let mut vm = MicroVm::incoming("killed-b", Card::make(3, "mtty-2"));
            let lost = receive(&place, &vm).done();
            assert_ne!(lost.code(), 0, "{}", lost.stderr);
            vm.wait_phase(MicroVmPhase::Waiting);
            let received = receive(&place, &vm).done();
            assert_eq!(received.code(), 0, "{}", received.stderr);
            vm.assert_card_is_whole();
            ended(&place);
        }
    }
}
