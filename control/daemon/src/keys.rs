//! X.509 keys on disk, under the five file names that QEMU, libvirt and Cloud Hypervisor share
//! (`tls-creds-x509` directory), so that one directory serves them all.
//!
//! `keys init` makes a CA and one host's certificates. What must never happen: an existing key overwritten.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use time::{Duration, OffsetDateTime};

use crate::failure::Failure;

const CA_CERT: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";
const SERVER_CERT: &str = "server-cert.pem";
const SERVER_KEY: &str = "server-key.pem";
const CLIENT_CERT: &str = "client-cert.pem";
const CLIENT_KEY: &str = "client-key.pem";

const CA_LIFE_DAYS: i64 = 3650;
const HOST_LIFE_DAYS: i64 = 825;

/// Makes `dir` with a CA and certificates for `hosts` (names or addresses). With a CA already in `dir` only the
/// host's certificates are made, so that every host of a fleet can be issued from one place. Returns the files written.
pub fn init(dir: &Path, hosts: &[String]) -> Result<Vec<PathBuf>, Failure> {
    if hosts.is_empty() {
        return Err(Failure::Refused(
            "name at least one host that the certificate is for: --host 192.0.2.7".into(),
        ));
    }
    fs::create_dir_all(dir).map_err(|e| cannot_write(dir, &e))?;
    for name in [SERVER_CERT, SERVER_KEY, CLIENT_CERT, CLIENT_KEY] {
        let path = dir.join(name);
        if path.exists() {
            return Err(Failure::Refused(format!(
                "{} exists and vmferry never overwrites a key: choose another --dir or move the old files away",
                path.display()
            )));
        }
    }
    let mut written = Vec::new();
    let issuer = certificate_authority(dir, &mut written)?;
    for (cert_name, key_name, usage) in [
        (SERVER_CERT, SERVER_KEY, ExtendedKeyUsagePurpose::ServerAuth),
        (CLIENT_CERT, CLIENT_KEY, ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate().map_err(|e| refused_by_rcgen(&e))?;
        let cert =
            host_parameters(hosts, usage)?.signed_by(&key, &issuer).map_err(|e| refused_by_rcgen(&e))?;
        write_new(&dir.join(cert_name), cert.pem().as_bytes(), 0o644, &mut written)?;
        write_new(&dir.join(key_name), key.serialize_pem().as_bytes(), 0o600, &mut written)?;
    }
    Ok(written)
}

fn certificate_authority(
    dir: &Path,
    written: &mut Vec<PathBuf>,
) -> Result<Issuer<'static, KeyPair>, Failure> {
    let (cert_path, key_path) = (dir.join(CA_CERT), dir.join(CA_KEY));
    match (cert_path.exists(), key_path.exists()) {
        (true, true) => {
            let key = fs::read_to_string(&key_path).map_err(|e| cannot_read(&key_path, &e))?;
            let cert = fs::read_to_string(&cert_path).map_err(|e| cannot_read(&cert_path, &e))?;
            let key = KeyPair::from_pem(&key).map_err(|e| not_pem(&key_path, &e))?;
            return Issuer::from_ca_cert_pem(&cert, key).map_err(|e| not_pem(&cert_path, &e));
        }
        (false, false) => {}
        (true, false) => {
            return Err(Failure::Refused(format!(
                "{} is there without {CA_KEY}: run keys init where the CA's key is, and copy the host's files here",
                cert_path.display()
            )));
        }
        (false, true) => {
            return Err(Failure::Refused(format!(
                "{} is there without {CA_CERT}: restore it or choose another --dir",
                key_path.display()
            )));
        }
    }
    let key = KeyPair::generate().map_err(|e| refused_by_rcgen(&e))?;
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = named("vmferry CA");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    live_for(&mut parameters, CA_LIFE_DAYS);
    let cert = parameters.self_signed(&key).map_err(|e| refused_by_rcgen(&e))?;
    write_new(&cert_path, cert.pem().as_bytes(), 0o644, written)?;
    write_new(&key_path, key.serialize_pem().as_bytes(), 0o600, written)?;
    Ok(Issuer::new(parameters, key))
}

fn host_parameters(hosts: &[String], usage: ExtendedKeyUsagePurpose) -> Result<CertificateParams, Failure> {
    let mut parameters = CertificateParams::new(hosts.to_vec()).map_err(|e| {
        Failure::Refused(format!(
            "--host {} is neither a DNS name nor an address ({e}): give the name that peers connect to",
            hosts.join(" ")
        ))
    })?;
    parameters.distinguished_name = named(&hosts[0]);
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    parameters.extended_key_usages = vec![usage];
    parameters.use_authority_key_identifier_extension = true;
    live_for(&mut parameters, HOST_LIFE_DAYS);
    Ok(parameters)
}

fn named(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common_name);
    name
}

/// A day of grace before now: the clocks of two hosts never agree to the second.
fn live_for(parameters: &mut CertificateParams, days: i64) {
    let now = OffsetDateTime::now_utc();
    parameters.not_before = now - Duration::days(1);
    parameters.not_after = now + Duration::days(days);
}

fn write_new(path: &Path, bytes: &[u8], mode: u32, written: &mut Vec<PathBuf>) -> Result<(), Failure> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(|e| cannot_write(path, &e))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| cannot_write(path, &e))?;
    written.push(path.to_owned());
    Ok(())
}

/// TLS for the side that listens: its own certificate, and every client must show one of the same CA.
pub fn server_config(dir: &Path) -> Result<Arc<ServerConfig>, Failure> {
    let roots = Arc::new(roots(dir)?);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .map_err(|e| Failure::Refused(format!("{} holds no usable CA: {e}", dir.join(CA_CERT).display())))?;
    let (chain, key) = identity(dir, SERVER_CERT, SERVER_KEY)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| Failure::Bug(format!("TLS 1.3 is not in this build: {e}")))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| {
            Failure::Refused(format!(
                "{} and {SERVER_KEY} do not belong together: {e}",
                dir.join(SERVER_CERT).display()
            ))
        })?;
    // No resumption: each attempt has its own handshake, and so its own exporter secret and lane keys.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// TLS for the side that dials: its own certificate, and the server must show one of the same CA for its host name.
pub fn client_config(dir: &Path) -> Result<Arc<ClientConfig>, Failure> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let (chain, key) = identity(dir, CLIENT_CERT, CLIENT_KEY)?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| Failure::Bug(format!("TLS 1.3 is not in this build: {e}")))?
        .with_root_certificates(roots(dir)?)
        .with_client_auth_cert(chain, key)
        .map_err(|e| {
            Failure::Refused(format!(
                "{} and {CLIENT_KEY} do not belong together: {e}",
                dir.join(CLIENT_CERT).display()
            ))
        })?;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(Arc::new(config))
}

fn roots(dir: &Path) -> Result<RootCertStore, Failure> {
    let path = dir.join(CA_CERT);
    let mut store = RootCertStore::empty();
    for cert in CertificateDer::pem_file_iter(&path).map_err(|e| no_key_file(&path, &e))? {
        let cert = cert.map_err(|e| no_key_file(&path, &e))?;
        store
            .add(cert)
            .map_err(|e| Failure::Refused(format!("{} is not a CA certificate: {e}", path.display())))?;
    }
    Ok(store)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(dir: &Path, cert_name: &str, key_name: &str) -> Result<Identity, Failure> {
    let (cert_path, key_path) = (dir.join(cert_name), dir.join(key_name));
    let chain = CertificateDer::pem_file_iter(&cert_path)
        .map_err(|e| no_key_file(&cert_path, &e))?
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| no_key_file(&cert_path, &e))?;
    let key = PrivateKeyDer::from_pem_file(&key_path).map_err(|e| no_key_file(&key_path, &e))?;
    Ok((chain, key))
}

fn no_key_file(path: &Path, error: &rustls::pki_types::pem::Error) -> Failure {
    Failure::Refused(format!(
        "cannot read {}: {error}; make the files with 'vmferry keys init --dir DIR --host ADDRESS' and name DIR with --tls-dir",
        path.display()
    ))
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::Permission(format!(
        "cannot write {}: {error}; choose a --dir that you may write",
        path.display()
    ))
}

fn cannot_read(path: &Path, error: &std::io::Error) -> Failure {
    Failure::Permission(format!("cannot read {}: {error}", path.display()))
}

fn not_pem(path: &Path, error: &rcgen::Error) -> Failure {
    Failure::Refused(format!(
        "{} is damaged ({error}): restore it, or start over in another --dir",
        path.display()
    ))
}

fn refused_by_rcgen(error: &rcgen::Error) -> Failure {
    Failure::Bug(format!("could not make a certificate: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_makes_qemus_file_names_and_never_overwrites() {
        let dir = tempfile::tempdir().unwrap();
        let written = init(dir.path(), &["127.0.0.1".into(), "host.example".into()]).unwrap();
        assert_eq!(written.len(), 6);
        server_config(dir.path()).unwrap();
        client_config(dir.path()).unwrap();
        let before = fs::read(dir.path().join(SERVER_KEY)).unwrap();
        let refusal = init(dir.path(), &["127.0.0.1".into()]).unwrap_err();
        assert_eq!(refusal.exit_code(), 78);
        assert_eq!(fs::read(dir.path().join(SERVER_KEY)).unwrap(), before);
    }

    #[test]
    fn a_second_host_is_issued_by_the_same_ca() {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path(), &["127.0.0.1".into()]).unwrap();
        let ca = fs::read(dir.path().join(CA_CERT)).unwrap();
        for name in [SERVER_CERT, SERVER_KEY, CLIENT_CERT, CLIENT_KEY] {
            fs::remove_file(dir.path().join(name)).unwrap();
        }
        assert_eq!(init(dir.path(), &["127.0.0.2".into()]).unwrap().len(), 4);
        assert_eq!(fs::read(dir.path().join(CA_CERT)).unwrap(), ca);
    }

    #[test]
    fn a_missing_directory_says_how_to_make_it() {
        let sentence = client_config(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(sentence.contains("vmferry keys init"), "{sentence}");
    }
}
