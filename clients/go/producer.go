package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// receipt is the server's answer to one append: where its entries are, or why it was refused.
type receipt struct {
	Topic       string `json:"topic"`
	FirstOffset *int64 `json:"first_offset"` // nil for a duplicate whose original place is no longer known
	Entries     int64  `json:"entries"`
	Sequence    int64  `json:"sequence"`
	Duplicate   bool   `json:"duplicate"`
	Status      string `json:"status"` // empty unless refused
	Error       string `json:"error"`
}

// place says which offsets the append got, first and last.
func (r receipt) place() string {
	if r.FirstOffset == nil {
		return "offsets unknown"
	}
	return fmt.Sprintf("offsets %d to %d", *r.FirstOffset, *r.FirstOffset+r.Entries-1)
}

// refusal is an append the server did not take. What comes after it on the stream is refused too.
type refusal struct{ receipt }

func (r refusal) Error() string { return fmt.Sprintf("%s: %s", r.Status, r.receipt.Error) }

// producer writes appends to one topic on one DoPut stream; each batch is an append of its own.
type producer struct {
	stream flight.FlightService_DoPutClient
	writer *flight.Writer
}

// produce opens the stream. It lives until its appends are all sent and answered, or ctx is cancelled.
func produce(ctx context.Context, client flight.Client, topic, name string, schema *arrow.Schema) (*producer, error) {
	stream, err := client.DoPut(metadata.AppendToOutgoingContext(ctx, "oplog-producer", name))
	if err != nil {
		return nil, err
	}
	writer := flight.NewRecordWriter(stream, ipc.WithSchema(schema))
	writer.SetFlightDescriptor(&flight.FlightDescriptor{Type: flight.DescriptorPATH, Path: []string{topic}})
	return &producer{stream, writer}, nil
}

// send sends one append and does not wait for its receipt. After an error, receive says what happened.
func (p *producer) send(sequence int64, batch arrow.RecordBatch) error {
	return p.writer.WriteWithAppMetadata(batch, fmt.Appendf(nil, `{"sequence": %d}`, sequence))
}

// receive returns the next receipt; receipts come in the order of the appends. A refused append is an error.
func (p *producer) receive() (receipt, error) {
	answer, err := p.stream.Recv()
	if err != nil {
		return receipt{}, err
	}
	var r receipt
	if err := json.Unmarshal(answer.AppMetadata, &r); err != nil {
		return receipt{}, fmt.Errorf("receipt %q: %w", answer.AppMetadata, err)
	}
	if r.Status != "" {
		return r, refusal{r}
	}
	return r, nil
}

// done says that nothing more is sent. Receipts that are under way can still be received.
func (p *producer) done() error { return p.stream.CloseSend() }

// end waits for the server's word on the stream as a whole, after the last receipt.
func (p *producer) end() error {
	if _, err := p.stream.Recv(); !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}

const (
	unacknowledgedMax = 64
	patience          = 60 * time.Second
	backoffMin        = 50 * time.Millisecond
	backoffMax        = 2 * time.Second
)

var stormSchema = arrow.NewSchema([]arrow.Field{{Name: "n", Type: arrow.PrimitiveTypes.Int64}}, nil)

// storm makes appends 0 to count-1 of one row each, exactly once, however often the server goes away meanwhile.
func storm(ctx context.Context, uri string, count int64) error {
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	// A deadline on progress, not on the whole: it also ends a call to a server that hangs.
	deadline := time.AfterFunc(patience, func() { giveUp(fmt.Errorf("no progress for %s", patience)) })
	defer deadline.Stop()

	backoff := backoffMin
	for next := int64(0); next < count; {
		acknowledged, err := stormOnce(ctx, uri, next, count, func() { deadline.Reset(patience) })
		if acknowledged > next {
			next, backoff = acknowledged, backoffMin
		}
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w; %d appends were acknowledged; the last error: %w", context.Cause(ctx), next, err)
		}
		if !isTransient(err) {
			return fmt.Errorf("append %d: %w", next, err)
		}
		fmt.Fprintf(os.Stderr, "append %d: %v; trying again in %s\n", next, err, backoff)
		time.Sleep(backoff)
		backoff = min(2*backoff, backoffMax)
	}
	return nil
}

// stormOnce sends appends from next on over one connection, and returns the first that has no receipt.
// Whatever it left unanswered is sent again by the next call with the same sequence numbers: that is all exactly-once takes.
func stormOnce(ctx context.Context, uri string, next, count int64, progress func()) (int64, error) {
	// A new connection each time: one that broke would wait out a backoff of its own.
	client, err := connect(ctx, uri)
	if err != nil {
		return next, err
	}
	defer client.Close()
	p, err := produce(ctx, client, "storm", "storm", stormSchema)
	if err != nil {
		return next, err
	}
	for sent := next; next < count; {
		for ; sent < count && sent-next < unacknowledgedMax; sent++ {
			batch := stormBatch(sent)
			err := p.send(sent, batch)
			batch.Release()
			if err != nil {
				break // the stream is broken, and receive knows why
			}
		}
		r, err := p.receive()
		if err != nil {
			return next, err
		}
		if r.Sequence != next {
			return next, fmt.Errorf("the receipt of append %d came where that of %d was due", r.Sequence, next)
		}
		next++
		progress()
	}
	p.done()
	p.end() // each append has its receipt: how the stream ends matters no more
	return next, nil
}

func stormBatch(n int64) arrow.RecordBatch {
	b := array.NewRecordBuilder(memory.DefaultAllocator, stormSchema)
	defer b.Release()
	b.Field(0).(*array.Int64Builder).Append(n)
	return b.NewRecordBatch()
}

// isTransient says whether the same append may succeed when it is sent again.
func isTransient(err error) bool {
	var refused refusal
	if errors.As(err, &refused) {
		return refused.Status == "UNAVAILABLE" || refused.Status == "CANCELLED"
	}
	if errors.Is(err, io.EOF) { // the server ended the stream without an answer to each append
		return true
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.Internal, codes.Unknown:
		return true
	}
	return false
}
