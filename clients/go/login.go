package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/apache/arrow-adbc/go/adbc"
	"github.com/apache/arrow-adbc/go/adbc/driver/flightsql"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// login is how to log in, as the environment says. Secrets come from files.
type login struct {
	authorities string // OPLOG_CA: PEM of the authorities that may vouch for a server (grpc+tls://)
	user        string // OPLOG_USER
	password    string // OPLOG_PASSWORD_FILE
	token       string // or OPLOG_TOKEN_FILE: an API token or a JWT
	certificate string // or, where the server takes those, OPLOG_CERT: PEM of a certificate
	key         string // OPLOG_KEY: PEM of its key
}

func loginOfEnvironment() (login, error) {
	l := login{user: os.Getenv("OPLOG_USER")}
	var err error
	for variable, text := range map[string]*string{
		"OPLOG_CA": &l.authorities, "OPLOG_PASSWORD_FILE": &l.password, "OPLOG_TOKEN_FILE": &l.token,
		"OPLOG_CERT": &l.certificate, "OPLOG_KEY": &l.key,
	} {
		if file, ok := os.LookupEnv(variable); ok {
			content, failed := os.ReadFile(file)
			*text, err = strings.TrimSpace(string(content)), errors.Join(err, failed)
		}
	}
	return l, err
}

// adbcOptions returns what an ADBC database is opened with.
func adbcOptions(uri string) (map[string]string, error) {
	l, err := loginOfEnvironment()
	options := map[string]string{adbc.OptionKeyURI: uri}
	for name, value := range map[string]string{
		adbc.OptionKeyUsername: l.user, adbc.OptionKeyPassword: l.password, flightsql.OptionSSLRootCerts: l.authorities,
		flightsql.OptionMTLSCertChain: l.certificate, flightsql.OptionMTLSPrivateKey: l.key,
	} {
		if value != "" {
			options[name] = value
		}
	}
	if l.token != "" {
		options[flightsql.OptionAuthorizationHeader] = "Bearer " + l.token
	}
	return options, err
}

// connect opens a Flight client of the server at a URI such as grpc+tls://localhost:8815, and logs in where there is a user.
func connect(ctx context.Context, uri string) (flight.Client, error) {
	l, err := loginOfEnvironment()
	if err != nil {
		return nil, err
	}
	scheme, address, _ := strings.Cut(uri, "://")
	transport := insecure.NewCredentials()
	switch scheme {
	case "grpc":
	case "grpc+tls":
		config, err := l.tls()
		if err != nil {
			return nil, err
		}
		transport = credentials.NewTLS(config)
	default:
		return nil, fmt.Errorf("%q is not of the form grpc://host:port or grpc+tls://host:port", uri)
	}
	authorization := &header{}
	client, err := flight.NewClientWithMiddleware(address, nil, nil,
		grpc.WithTransportCredentials(transport), grpc.WithPerRPCCredentials(authorization))
	if err != nil {
		return nil, err
	}
	if l.user != "" {
		answered, err := client.AuthenticateBasicToken(ctx, l.user, l.password)
		if err != nil {
			return nil, errors.Join(err, client.Close())
		}
		sent, _ := metadata.FromOutgoingContext(answered)
		authorization.value = strings.Join(sent.Get("authorization"), "")
	} else if l.token != "" {
		authorization.value = "Bearer " + l.token
	}
	return client, nil
}

func (l login) tls() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if l.authorities != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM([]byte(l.authorities)) {
			return nil, errors.New("OPLOG_CA has no certificate")
		}
	}
	if l.certificate != "" {
		pair, err := tls.X509KeyPair([]byte(l.certificate), []byte(l.key))
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// header is sent with every call.
type header struct{ value string }

func (h *header) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if h.value == "" {
		return nil, nil
	}
	return map[string]string{"authorization": h.value}, nil
}

func (h *header) RequireTransportSecurity() bool { return false }
