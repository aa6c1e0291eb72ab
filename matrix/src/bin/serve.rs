//! Serves this machine's CPU to `burn-remote` clients on a port of the loopback interface, which it prints.

use std::net::TcpListener;
use std::process::ExitCode;

use burn::server::{RemoteServer, WebSocketTransport};
use burn::tensor::Device;

fn main() -> ExitCode {
    let listener = match TcpListener::bind("127.0.0.1:0") {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("no port on the loopback interface can be opened: {error}");
            return ExitCode::FAILURE;
        }
    };
    let address = listener
        .local_addr()
        .expect("a bound listener has an address");
    println!("{address}");
    let server = RemoteServer::new([Device::flex()]);
    match server.serve(WebSocketTransport::from_listener(listener)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the server stopped: {error}");
            ExitCode::FAILURE
        }
    }
}
