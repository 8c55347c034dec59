//! The command line: words that virsh, QEMU and ch-remote users already type.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vmferry_guest::GuestSpec;
use vmferry_guest::failover::DeviceOptions;
use vmferry_guest::inspect::InspectSpec;

use crate::endpoint::Endpoint;
use crate::quantity::{Bandwidth, CpuList, LaneCount};

/// Moves running virtual machines between hosts.
#[derive(Debug, Parser)]
#[command(
    name = "vmferry",
    version,
    about,
    after_help = "Exit codes: 'vmferry exit-codes'. Logs: VMFERRY_LOG=debug."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Move a running guest to a target where 'vmferry receive' waits.
    Send(SendArgs),
    /// Wait for one guest and run it here.
    Receive(ReceiveArgs),
    /// Make or inspect the keys that protect a move.
    #[command(subcommand)]
    Keys(KeysVerb),
    /// Show the main job on this machine: two QEMUs where installed, else two workload processes.
    Demo(DemoArgs),
    /// Show what this host offers and what vmferry will use.
    Doctor(DoctorArgs),
    /// Show a guest without touching it: memory, trackers, writers, devices, and what keeps it from being moved.
    Inspect(InspectArgs),
    /// Run the embedded guest: a process with seeded writers that proves its own memory.
    Workload(vmferry_guest::process::WorkloadArgs),
    /// Run a micro-VM on KVM: a Linux guest that 'kvm:NAME' moves.
    #[command(name = "microvm")]
    MicroVm(vmferry_guest::kvm::MicroVmArgs),
    /// Print the table of exit codes.
    ExitCodes,
    /// Brings a source guest back when its sender dies; started by 'send'.
    #[command(hide = true)]
    Guardian(GuardianArgs),
}

/// `vmferry keys …`
#[derive(Debug, Subcommand)]
pub enum KeysVerb {
    /// Make a CA (or use the one in DIR) and a host's certificates, under QEMU's file names.
    Init(KeysInitArgs),
}

/// `vmferry inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// What to look at: qemu:PATH of its QMP socket, kvm:NAME, process:NAME, or pid:PID of any VMM.
    #[arg(value_name = "GUEST")]
    pub guest: InspectSpec,
    /// One JSON object instead of the table.
    #[arg(long)]
    pub json: bool,
}

/// `vmferry keys init`
#[derive(Debug, Args)]
pub struct KeysInitArgs {
    /// Directory for the files; made when missing.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Name or address that peers connect to; may be given more than once.
    #[arg(long = "host", value_name = "NAME", required = true)]
    pub hosts: Vec<String>,
}

/// How both sides protect the move.
#[derive(Debug, Clone, Args)]
pub struct SecurityArgs {
    /// Directory with ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem, client-key.pem ('vmferry keys init').
    #[arg(long, value_name = "DIR", required_unless_present = "insecure_plaintext")]
    pub tls_dir: Option<PathBuf>,
    /// No encryption and no authentication; must be given on both sides.
    #[arg(long, conflicts_with = "tls_dir")]
    pub insecure_plaintext: bool,
}

/// How lanes over RDMA are used.
#[derive(Debug, Clone, Args)]
pub struct RdmaArgs {
    /// Over RDMA, write pages in clear, straight into the target's guest; records stay sealed. Only for fabrics that
    /// encrypt in the card. Both sides must give it; the target locks what is written to, unless its card pages by itself.
    #[arg(long)]
    pub rdma_direct_plaintext: bool,
    /// When the RDMA link cannot be made, or is lost before Commit, try once more over this. Give it to both sides; the
    /// source knocks for at most 20 s until the target has noticed the loss and listens again.
    #[arg(long, value_enum, value_name = "tcp")]
    pub rdma_fallback: Option<Fallback>,
}

/// What a target in direct mode locks of its guest. Without either: all that pages come for, or as much of it at a time as
/// the limit of locked memory allows.
#[derive(Debug, Clone, Args)]
pub struct PinArgs {
    /// Lock at most so much of the guest at a time, 4MiB or more for each lane: what was written to longest ago is let go.
    #[arg(long, value_name = "SIZE", requires = "rdma_direct_plaintext", conflicts_with = "rdma_pin_all")]
    pub rdma_pin_max: Option<bytesize::ByteSize>,
    /// Lock all of the guest before the first page comes.
    #[arg(long, requires = "rdma_direct_plaintext")]
    pub rdma_pin_all: bool,
}

/// `--rdma-fallback`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fallback {
    /// TCP on the same host and port.
    Tcp,
}

/// `vmferry send`
#[derive(Debug, Clone, Args)]
pub struct SendArgs {
    /// The guest to move: qemu:PATH of its QMP socket, kvm:NAME or process:NAME.
    #[arg(long, value_name = "GUEST")]
    pub guest: GuestSpec,
    /// Where 'vmferry receive' listens: tcp://HOST:PORT, or rdma://HOST:PORT for lanes over RDMA.
    #[arg(long, value_name = "URI")]
    pub to: Endpoint,
    /// How the move is protected.
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Name that the target's certificate must carry, where it is not the host in --to.
    #[arg(long, value_name = "NAME")]
    pub tls_hostname: Option<String>,
    /// Longest blackout that is acceptable: the switchover waits until the predicted upper bound fits.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = humantime::parse_duration)]
    pub downtime_limit: Duration,
    /// What to do when the guest dirties memory faster than the limit allows.
    #[arg(long, value_enum, default_value_t = NoConverge::Abort)]
    pub on_no_converge: NoConverge,
    /// Lanes (pinned threads with one connection each): auto or a number.
    #[arg(
        long,
        value_name = "auto|N",
        default_value = "auto",
        alias = "parallel-connections",
        alias = "connections"
    )]
    pub lanes: LaneCount,
    /// CPUs that lanes may be pinned to.
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
    /// Cap on the bytes a second of all lanes together: 10Gbit, 500MB, or a plain number of MiB/s.
    #[arg(long, value_name = "RATE")]
    pub bandwidth: Option<Bandwidth>,
    /// Give up, and let the guest run on here, after this time.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    pub timeout: Duration,
    /// Compress pages: off, zstd, or auto (on where a measurement of this link says it pays).
    #[arg(long, value_enum, default_value_t = Compress::Off)]
    pub compress: Compress,
    /// Lanes over RDMA.
    #[command(flatten)]
    pub rdma: RdmaArgs,
    /// Compare a digest of all memory on both sides inside the blackout; the move ends when they differ.
    #[arg(long)]
    pub verify: bool,
    /// What happens to devices that cannot migrate.
    #[command(flatten)]
    pub failover: FailoverArgs,
    /// One JSON object as the last line of stdout.
    #[arg(long)]
    pub json: bool,
}

/// Devices that cannot migrate: they leave before the first page and come back on the target, or here when the move fails.
#[derive(Debug, Clone, Args)]
pub struct FailoverArgs {
    /// Ask the guest for the primaries of net_failover pairs (virtio-net-pci failover=on), or refuse a guest that has one.
    #[arg(long, value_enum, default_value_t = Failover::Auto)]
    pub failover: Failover,
    /// Plug a virtio NIC for a device that has no standby, as QEMU's -device: virtio-net-pci,for=ID,id=…,netdev=…,bus=…
    #[arg(long = "failover-standby", value_name = "DEVICE")]
    pub standbys: Vec<DeviceOptions>,
    /// How long the guest may take to give a device up; it is asked four times.
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = humantime::parse_duration)]
    pub unplug_timeout: Duration,
    /// What to do then: abort the move, or wait until it is cancelled or --timeout is over.
    #[arg(long, value_enum, default_value_t = UnplugTimeout::Abort)]
    pub on_unplug_timeout: UnplugTimeout,
}

/// `--failover`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Failover {
    /// Primaries are unplugged for the move.
    Auto,
    /// A guest with a primary is refused.
    Off,
}

/// `--on-unplug-timeout`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum UnplugTimeout {
    /// Stop, undo what was done; the source runs on.
    Abort,
    /// Ask again and again, as QEMU does in its state wait-unplug.
    Wait,
}

/// `vmferry receive`
#[derive(Debug, Clone, Args)]
pub struct ReceiveArgs {
    /// Address to listen on: tcp://HOST:PORT, or rdma://HOST:PORT of an RDMA card's address.
    #[arg(long, value_name = "URI")]
    pub listen: Endpoint,
    /// The guest that waits for the state: qemu:PATH of its QMP socket (started with -incoming defer), kvm:NAME or process:NAME (started with --incoming).
    #[arg(long, value_name = "GUEST")]
    pub guest: GuestSpec,
    /// How the move is protected.
    #[command(flatten)]
    pub security: SecurityArgs,
    /// CPUs that lanes may be pinned to.
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,
    /// Lanes over RDMA.
    #[command(flatten)]
    pub rdma: RdmaArgs,
    /// What direct mode locks of this guest.
    #[command(flatten)]
    pub pin: PinArgs,
    /// This host's primary for the guest's standby, as QEMU's -device: vfio-pci,host=0000:01:10.0,id=vf0[,failover_pair_id=net0]
    #[arg(long = "failover-primary", value_name = "DEVICE")]
    pub primaries: Vec<DeviceOptions>,
    /// Give up when no move has begun after this time (default: wait for ever).
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub timeout: Option<Duration>,
    /// One JSON object as the last line of stdout.
    #[arg(long)]
    pub json: bool,
}

/// `--on-no-converge`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NoConverge {
    /// Stop, say why and what would help; the source runs on.
    Abort,
    /// Slow the guest down in steps until it fits.
    Throttle,
    /// Switch over although the blackout will be longer than the limit.
    Force,
}

/// `--compress`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// As they are.
    #[value(alias = "none")]
    Off,
    /// zstd where this link is slower than zstd on a core.
    Auto,
    /// zstd always.
    Zstd,
}

/// `vmferry demo`
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Guest memory.
    #[arg(long, value_name = "BYTES", default_value = "512MiB")]
    pub ram: bytesize::ByteSize,
    /// Which guests: auto takes QEMU where it and a guest kernel are installed.
    #[arg(long, value_enum, default_value_t = DemoGuests::Auto)]
    pub guests: DemoGuests,
    /// One JSON object as the last line of stdout.
    #[arg(long)]
    pub json: bool,
}

/// `--guests`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DemoGuests {
    /// QEMU where possible, else processes.
    Auto,
    /// Two QEMUs with a Linux guest.
    Qemu,
    /// Two workload processes.
    Process,
}

/// `vmferry doctor`
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// One JSON object as the last line of stdout.
    #[arg(long)]
    pub json: bool,
}

/// `vmferry guardian`
#[derive(Debug, Clone, Args)]
pub struct GuardianArgs {
    /// The guest to bring back.
    #[arg(long)]
    pub guest: GuestSpec,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documented_lines_parse() {
        for line in [
            "vmferry keys init --dir pki --host 127.0.0.1",
            "vmferry receive --listen tcp://127.0.0.1:7700 --guest qemu:/run/b.qmp --tls-dir pki --json",
            "vmferry send --guest qemu:/run/a.qmp --to tcp://127.0.0.1:7700 --tls-dir pki --downtime-limit 300ms --lanes auto --cpus 0-1 --bandwidth 10Gbit --timeout 10min --compress off --verify --json",
            "vmferry send --guest process:a --to tcp://127.0.0.1:7700 --insecure-plaintext --on-no-converge throttle",
            "vmferry microvm --name a --kernel /boot/vmlinuz --initramfs root.cpio --append quiet --ram 128MiB --dirty ring --cpu-features host,-avx2",
            "vmferry microvm --name a --flat code --vfio mtty0=/sys/bus/mdev/devices/83b8 --vfio eth1=/sys/bus/pci/devices/0000:01:10.0",
            "vmferry microvm --name b --incoming --console none --beat unix:/run/beat",
            "vmferry receive --listen rdma://192.0.2.7:7700 --guest process:b --tls-dir pki --rdma-fallback tcp",
            "vmferry receive --listen rdma://192.0.2.7:7700 --guest process:b --tls-dir pki --rdma-direct-plaintext --rdma-pin-max 1GiB",
            "vmferry receive --listen rdma://192.0.2.7:7700 --guest process:b --tls-dir pki --rdma-direct-plaintext --rdma-pin-all",
            "vmferry send --guest process:a --to rdma://192.0.2.7:7700 --tls-dir pki --rdma-direct-plaintext",
            "vmferry send --guest process:a --to rdma:192.0.2.7:7700 --tls-dir pki --rdma-fallback tcp",
            "vmferry send --guest qemu:/run/a.qmp --to tcp://127.0.0.1:7700 --tls-dir pki --failover auto --failover-standby virtio-net-pci,for=vf0,id=net0,netdev=n0,bus=rp2 --unplug-timeout 5s --on-unplug-timeout wait",
            "vmferry receive --listen tcp://127.0.0.1:7700 --guest qemu:/run/b.qmp --tls-dir pki --failover-primary vfio-pci,host=0000:01:10.0,id=vf0",
            "vmferry demo",
            "vmferry doctor",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }

    #[test]
    fn plaintext_is_never_a_default() {
        let line = "vmferry send --guest process:a --to tcp://127.0.0.1:7700";
        assert!(Cli::try_parse_from(line.split(' ')).is_err());
    }
}
