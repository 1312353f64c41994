//! How to connect and log in, as the environment says. Secrets come from files.
//!
//!     OPLOG_CA                            PEM file of the authorities that may vouch for a server (grpc+tls://),
//!                                        instead of the system's
//!     OPLOG_USER and OPLOG_PASSWORD_FILE  a user's name and password
//!     OPLOG_TOKEN_FILE                    or a bearer: an API token or a JWT
//!     OPLOG_CERT and OPLOG_KEY            or PEM files of a certificate and its key, where the server takes those

use std::env;
use std::fs;

use arrow_flight::FlightClient;
use arrow_flight::sql::client::FlightSqlServiceClient;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::Result;

/// One connection, and the bearer that goes with every call on it.
pub struct Login {
    channel: Channel,
    bearer: Option<String>,
}

impl Login {
    /// Connects to an address as flight_oplog prints it, and logs in where there is a user.
    pub async fn connect(uri: &str) -> Result<Login> {
        // Tonic knows gRPC by the scheme of the HTTP/2 underneath.
        let endpoint = match uri.strip_prefix("grpc+tls://") {
            Some(address) => Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls()?)?,
            None => Endpoint::from_shared(uri.replacen("grpc://", "http://", 1))?,
        };
        let mut login = Login { channel: endpoint.connect().await?, bearer: text("OPLOG_TOKEN_FILE")? };
        if let Ok(user) = env::var("OPLOG_USER") {
            let mut client = FlightSqlServiceClient::new(login.channel.clone());
            client.handshake(&user, &text("OPLOG_PASSWORD_FILE")?.unwrap_or_default()).await?;
            login.bearer = client.token().cloned();
        }
        Ok(login)
    }

    pub fn flight(&self) -> Result<FlightClient> {
        let mut client = FlightClient::new(self.channel.clone());
        if let Some(bearer) = &self.bearer {
            client.add_header("authorization", &format!("Bearer {bearer}"))?;
        }
        Ok(client)
    }

    pub fn sql(&self) -> FlightSqlServiceClient<Channel> {
        let mut client = FlightSqlServiceClient::new(self.channel.clone());
        if let Some(bearer) = &self.bearer {
            client.set_token(bearer.clone());
        }
        client
    }
}

fn tls() -> Result<ClientTlsConfig> {
    let mut config = match text("OPLOG_CA")? {
        Some(authorities) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let (Some(certificate), Some(key)) = (text("OPLOG_CERT")?, text("OPLOG_KEY")?) {
        config = config.identity(Identity::from_pem(certificate, key));
    }
    Ok(config)
}

/// Returns what is in the file that a variable names, if it names one.
fn text(variable: &str) -> Result<Option<String>> {
    match env::var(variable) {
        Ok(file) => Ok(Some(fs::read_to_string(&file).map_err(|error| format!("{file}: {error}"))?.trim().to_owned())),
        Err(_) => Ok(None),
    }
}
