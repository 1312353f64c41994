// A client of flight_oplog: produce exactly once, ingest in bulk, ask with parameters, follow.
//
//	oplog-client URI          does each once, on a fresh log
//	oplog-client URI storm N  makes N appends, each exactly once, while the server may come and go
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"time"

	"github.com/apache/arrow-adbc/go/adbc"
	"github.com/apache/arrow-adbc/go/adbc/driver/flightsql"
	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/memory"
)

var (
	allocator = memory.DefaultAllocator
	epoch     = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

	ordersSchema = arrow.NewSchema([]arrow.Field{
		{Name: "id", Type: arrow.PrimitiveTypes.Int64},
		{Name: "customer", Type: arrow.BinaryTypes.String},
		{Name: "amount", Type: arrow.PrimitiveTypes.Float64},
		{Name: "placed", Type: &arrow.TimestampType{Unit: arrow.Microsecond, TimeZone: "UTC"}},
	}, nil)
	readingsSchema = arrow.NewSchema([]arrow.Field{
		{Name: "id", Type: arrow.PrimitiveTypes.Int64},
		{Name: "value", Type: arrow.PrimitiveTypes.Float64},
	}, nil)
	parametersSchema = arrow.NewSchema([]arrow.Field{
		{Name: "1", Type: arrow.PrimitiveTypes.Float64},
		{Name: "2", Type: arrow.BinaryTypes.String},
	}, nil)
)

func main() {
	ctx := context.Background()
	var err error
	switch {
	case len(os.Args) == 2:
		err = tour(ctx, os.Args[1])
	case len(os.Args) == 4 && os.Args[2] == "storm":
		var count int64
		if count, err = strconv.ParseInt(os.Args[3], 10, 64); err == nil {
			err = storm(ctx, os.Args[1], count)
		}
		if err == nil {
			fmt.Printf("storm: %d appends acknowledged\n", count)
		}
	default:
		err = errors.New("usage: run URI | run URI storm N")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func tour(ctx context.Context, uri string) error {
	client, err := connect(ctx, uri)
	if err != nil {
		return err
	}
	defer client.Close()
	if err := produceOrders(ctx, client); err != nil {
		return fmt.Errorf("produce: %w", err)
	}
	if err := askSQL(ctx, uri); err != nil {
		return fmt.Errorf("SQL: %w", err)
	}
	if err := tailOrders(ctx, client); err != nil {
		return fmt.Errorf("tail: %w", err)
	}
	return nil
}

// produceOrders makes three appends exactly once, and shows what the server says to a repetition and to a gap.
func produceOrders(ctx context.Context, client flight.Client) error {
	p, err := produce(ctx, client, "orders", "till-1", ordersSchema)
	if err != nil {
		return err
	}
	for k := range int64(3) { // all are under way before the first receipt is read
		p.send(k, orders(k)) // where the stream is broken, receive says why
	}
	p.done()
	for k := range 3 {
		r, err := p.receive()
		if err != nil {
			return err
		}
		fmt.Printf("append %d: %s\n", k, r.place())
	}
	if err := p.end(); err != nil {
		return err
	}

	// As after a crash: whoever does not know whether an append arrived sends it again.
	if p, err = produce(ctx, client, "orders", "till-1", ordersSchema); err != nil {
		return err
	}
	p.send(1, orders(1))
	p.send(7, orders(7)) // 3 is due
	p.done()
	again, err := p.receive()
	if err != nil {
		return err
	}
	fmt.Printf("append 1 again: duplicate, %s\n", again.place())
	if !again.Duplicate {
		return errors.New("the repeated append is no duplicate")
	}

	_, err = p.receive()
	var refused refusal
	if !errors.As(err, &refused) {
		return fmt.Errorf("append 7 was not refused: %v", err)
	}
	expected := regexp.MustCompile(`expected (\d+)`).FindStringSubmatch(refused.receipt.Error)
	if expected == nil {
		return refused
	}
	fmt.Printf("append 7: refused, expected %s\n", expected[1])
	if p.end() == nil {
		return errors.New("the stream of a refused append ended well")
	}
	return nil
}

// orders returns append k: two orders.
func orders(k int64) arrow.RecordBatch {
	b := array.NewRecordBuilder(allocator, ordersSchema)
	defer b.Release()
	id, customer := b.Field(0).(*array.Int64Builder), b.Field(1).(*array.StringBuilder)
	amount, placed := b.Field(2).(*array.Float64Builder), b.Field(3).(*array.TimestampBuilder)
	id.AppendValues([]int64{2 * k, 2*k + 1}, nil)
	customer.AppendValues([]string{"ada", "grace"}, nil)
	amount.AppendValues([]float64{10*float64(k) + 0.5, 20*float64(k) + 0.25}, nil)
	for _, n := range []int64{2 * k, 2*k + 1} {
		placed.AppendTime(epoch.Add(time.Duration(n) * time.Minute))
	}
	return b.NewRecordBatch()
}

// askSQL uses the log as a database, through ADBC.
func askSQL(ctx context.Context, uri string) error {
	options, err := adbcOptions(uri)
	if err != nil {
		return err
	}
	database, err := flightsql.NewDriver(allocator).NewDatabase(options)
	if err != nil {
		return err
	}
	defer database.Close()
	connection, err := database.Open(ctx)
	if err != nil {
		return err
	}
	defer connection.Close()

	if err := ingestReadings(ctx, connection); err != nil {
		return err
	}
	err = query(ctx, connection, "SELECT count(*) AS n, max(value) AS top FROM readings", nil, func(row arrow.RecordBatch, i int) {
		n, top := row.Column(0).(*array.Int64), row.Column(1).(*array.Float64)
		fmt.Printf("readings: %d, top %.2f\n", n.Value(i), top.Value(i))
	})
	if err != nil {
		return err
	}

	b := array.NewRecordBuilder(allocator, parametersSchema)
	defer b.Release()
	b.Field(0).(*array.Float64Builder).Append(0.4)
	b.Field(1).(*array.StringBuilder).Append("nobody")
	parameters := b.NewRecordBatch()
	defer parameters.Release()
	const totals = `SELECT customer, count(*) AS n, sum(amount) AS total FROM orders
		WHERE amount > ? AND customer <> ? GROUP BY customer ORDER BY customer`
	return query(ctx, connection, totals, parameters, func(row arrow.RecordBatch, i int) {
		customer, n, total := row.Column(0).(*array.String), row.Column(1).(*array.Int64), row.Column(2).(*array.Float64)
		fmt.Printf("%s: %d orders, %.2f\n", customer.Value(i), n.Value(i), total.Value(i))
	})
}

// ingestReadings creates a topic from a stream of batches: all of them are one append.
func ingestReadings(ctx context.Context, connection adbc.Connection) error {
	const batchCount, batchRows = 4, 2500
	b := array.NewRecordBuilder(allocator, readingsSchema)
	defer b.Release()
	var batches []arrow.RecordBatch
	for first := 0; first < batchCount*batchRows; first += batchRows {
		for n := first; n < first+batchRows; n++ {
			b.Field(0).(*array.Int64Builder).Append(int64(n))
			b.Field(1).(*array.Float64Builder).Append(float64(n) / 4)
		}
		batches = append(batches, b.NewRecordBatch())
	}
	reader, err := array.NewRecordReader(readingsSchema, batches)
	if err != nil {
		return err
	}

	statement, err := connection.NewStatement()
	if err != nil {
		return err
	}
	defer statement.Close()
	err = errors.Join(
		statement.SetOption(adbc.OptionKeyIngestTargetTable, "readings"),
		statement.SetOption(adbc.OptionKeyIngestMode, adbc.OptionValueIngestModeCreate),
		statement.BindStream(ctx, reader),
	)
	if err != nil {
		return err
	}
	entries, err := statement.ExecuteUpdate(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("ingest: %d entries\n", entries)
	return nil
}

// query runs a SELECT, with one row of parameters unless that is nil, and shows each row of the result.
func query(ctx context.Context, connection adbc.Connection, sql string, parameters arrow.RecordBatch, show func(arrow.RecordBatch, int)) error {
	statement, err := connection.NewStatement()
	if err != nil {
		return err
	}
	defer statement.Close()
	if err := statement.SetSqlQuery(sql); err != nil {
		return err
	}
	if parameters != nil { // values are bound to a prepared statement
		if err := errors.Join(statement.Prepare(ctx), statement.Bind(ctx, parameters)); err != nil {
			return err
		}
	}
	rows, _, err := statement.ExecuteQuery(ctx)
	if err != nil {
		return err
	}
	defer rows.Release()
	for rows.Next() {
		batch := rows.RecordBatch()
		for i := range int(batch.NumRows()) {
			show(batch, i)
		}
	}
	return rows.Err()
}

// tailOrders follows the topic from offset 4 until it has seen two entries.
func tailOrders(ctx context.Context, client flight.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a follower never ends by itself
	stream, err := client.DoGet(ctx, &flight.Ticket{Ticket: []byte(`{"topic": "orders", "from": 4, "follow": true}`)})
	if err != nil {
		return err
	}
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		return err
	}
	defer reader.Release()

	var place struct {
		NextOffset int64 `json:"next_offset"` // where to come back after a break
	}
	for seen := 0; seen < 2 && reader.Next(); {
		batch := reader.RecordBatch() // may be empty: a quiet topic says that it is alive
		id, customer, amount := batch.Column(0).(*array.Int64), batch.Column(1).(*array.String), batch.Column(2).(*array.Float64)
		for i := range int(batch.NumRows()) {
			fmt.Printf("tail: %d %s %.2f\n", id.Value(i), customer.Value(i), amount.Value(i))
			seen++
		}
		if words := reader.LatestAppMetadata(); len(words) > 0 { // a batch without goes on in the next
			if err := json.Unmarshal(words, &place); err != nil {
				return err
			}
		}
	}
	if err := reader.Err(); err != nil {
		return err
	}
	fmt.Printf("tail: next offset %d\n", place.NextOffset)
	return nil
}
